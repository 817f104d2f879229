"""The same as ``lorikeet serve``, for ``python -m lorikeet.launch_server``."""

from __future__ import annotations

import sys

from lorikeet.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
