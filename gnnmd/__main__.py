"""``python -m gnnmd``, for launchers that start modules: ``torchrun --nproc-per-node 4 -m gnnmd train``."""

import sys

from gnnmd.cli import main

if __name__ == "__main__":
    sys.exit(main())
