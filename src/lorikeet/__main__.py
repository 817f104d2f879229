"""The command ``lorikeet``, and ``python -m lorikeet``: what signals do first, and then everything else."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lorikeet import signals


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; see ``lorikeet/cli.py``, whose import takes a while."""
    try:
        signals.exit_on_stop()
        with signals.exit_on_interrupt():
            from lorikeet.cli import main as run
        return run(argv)
    except KeyboardInterrupt:
        return 130  # between that import and the commands, which say so themselves


if __name__ == "__main__":
    sys.exit(main())
