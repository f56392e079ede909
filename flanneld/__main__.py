"""``python -m flanneld``."""

import sys

from flanneld.cli import main

if __name__ == "__main__":
    sys.exit(main())
