"""`python -m pdrelay`."""

from __future__ import annotations

import sys

from pdrelay.cli import main

if __name__ == "__main__":
    sys.exit(main())
