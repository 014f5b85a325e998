"""`python -m tests.sweep --source timm --workers 2`: convert every model of a zoo, check each."""

import multiprocessing
import os
import sys

# As recipes/__main__.py does, and for its reason; before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from tests.sweep.command import main

if __name__ == "__main__":
    multiprocessing.set_forkserver_preload(["tests.sweep.one"])
    sys.exit(main(sys.argv[1:]))
