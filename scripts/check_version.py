"""Fail if the newest release in CHANGELOG.md is not the version of the package."""

import re
import sys
from pathlib import Path

import lorikeet

CHANGELOG = Path(__file__).parent.parent / "CHANGELOG.md"


def newest_release(text: str) -> str | None:
    """The first heading of the form ``## [1.2.3] - 2026-01-31``."""
    match = re.search(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d{2}-\d{2}$", text, re.MULTILINE)
    return match[1] if match else None


def main() -> int:
    newest = newest_release(CHANGELOG.read_text(encoding="utf-8"))
    if newest == lorikeet.__version__:
        return 0
    sys.stderr.write(f"CHANGELOG.md says {newest}, the package {lorikeet.__version__}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
