"""``python -m geoaccel``, which is how ``torchrun`` starts the command line."""

import sys

from geoaccel.cli import main

if __name__ == "__main__":
    sys.exit(main())
