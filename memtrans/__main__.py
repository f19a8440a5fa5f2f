"""`python -m memtrans`."""

from __future__ import annotations

import sys


def main() -> int:
    """Runs the command line; Ctrl-C while everything is still being imported ends quietly too."""
    try:
        from memtrans.cli.main import main as run

        return run()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
