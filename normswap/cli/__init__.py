"""The command line: `normswap` or `python -m normswap`."""

from normswap.cli.main import main as main
