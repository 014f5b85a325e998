"""``python -m normswap``."""

from normswap.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
