"""``python -m tarragon`` is the ``tarragon`` command."""

import sys

from tarragon.cli import main

if __name__ == "__main__":
    sys.exit(main())
