"""`python -m goose_mm` is `goose-mm`."""

import sys

from goose_mm.cli import main

if __name__ == "__main__":
    sys.exit(main())
