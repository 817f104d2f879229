"""Write the pages of docs/ that are generated from the code. A test compares them with it."""

from pathlib import Path

from lorikeet import envs
from lorikeet.config import parsing as options
from lorikeet.core import sampling

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {
    "environment.md": envs.markdown,
    "options.md": options.markdown,
    "sampling.md": sampling.markdown,
}

if __name__ == "__main__":
    for name, text in PAGES.items():
        (DOCS / name).write_text(text(), encoding="utf-8")
