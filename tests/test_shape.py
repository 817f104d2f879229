"""The size of the package: a newcomer reads it in an afternoon, and it stays so.

The numbers are a feeling for size, not a limit to game. What does not fit is usually two things.
"""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import pytest

from lorikeet import errors

PACKAGE = Path(errors.__file__).parent
ROOT = PACKAGE.parent.parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Lines with code on them, by package, so that a feature shows which part of the house grew: comments, docstrings and blank
# lines explain, and explaining is free. "." is the files at the top. A package that reaches its number is a reason to
# simplify first; one that is raised says in the commit what for.
MAX_CODE_LINES = {
    ".": 1_850,
    "adapters": 3_700,
    "attention": 650,
    "client": 1_250,
    "config": 950,
    "core": 850,
    "demo": 50,
    "engine": 900,
    "kv": 450,
    "layers": 350,
    "lora": 1_500,
    "models": 900,
    "ops": 2_050,
    "parallel": 50,
    "scheduler": 1_000,
    "server": 3_200,
    "text": 1_450,
    "worker": 3_100,
}
# A higher number invites files that are several things, a lower one cuts objects in halves that share private state.
MAX_FILE_LINES = 600
MAX_TEST_FILE_LINES = 600
MAX_FUNCTION_LINES = 60
# A kernel is one function by the nature of the compiler.
MAX_KERNEL_LINES = 120
CODE = {tokenize.NAME, tokenize.NUMBER, tokenize.STRING, tokenize.OP}
KERNELS = ("ops/triton", "ops/lora/triton")


def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def docstrings(tree: ast.AST) -> list[tuple[ast.AST, ast.stmt]]:
    """Each module, class and function that has a docstring, with it."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return [
        (node, node.body[0])
        for node in ast.walk(tree)
        if isinstance(node, kinds) and ast.get_docstring(node) is not None
    ]


def lines_of(node: ast.stmt) -> range:
    assert node.end_lineno is not None
    return range(node.lineno, node.end_lineno + 1)


def num_code_lines(path: Path) -> int:
    text = path.read_text(encoding="utf-8")
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type in CODE
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(lines.difference(*(lines_of(text) for _, text in docstrings(ast.parse(text)))))


def functions(path: Path) -> list[tuple[str, int]]:
    """Name and length of each function, its docstring not counted: explaining is free."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    explained = {id(node): len(lines_of(text)) for node, text in docstrings(tree)}
    return [
        (node.name, len(lines_of(node)) - explained.get(id(node), 0))
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def test_packages():
    sizes: dict[str, int] = dict.fromkeys(MAX_CODE_LINES, 0)
    for path in FILES:
        package = path.relative_to(PACKAGE).parts[0] if path.parent != PACKAGE else "."
        sizes[package] = sizes.get(package, 0) + num_code_lines(path)
    assert not {name: size for name, size in sizes.items() if size > MAX_CODE_LINES.get(name, 0)}


def test_files():
    large = {path.name: num_lines(path) for path in FILES if num_lines(path) > MAX_FILE_LINES}
    assert not large


def test_test_files():
    sizes = {str(path): num_lines(path) for path in sorted((ROOT / "tests").rglob("*.py"))}
    assert not {name: size for name, size in sizes.items() if size > MAX_TEST_FILE_LINES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_functions(path):
    is_kernel = path.relative_to(PACKAGE).as_posix().startswith(KERNELS)
    most = MAX_KERNEL_LINES if is_kernel else MAX_FUNCTION_LINES
    assert not {name: size for name, size in functions(path) if size > most}


def test_docstrings_are_not_counted(tmp_path):
    path = tmp_path / "x.py"
    path.write_text('def f():\n    """One.\n\n    Two.\n    """\n    return 1\n', encoding="utf-8")
    assert functions(path) == [("f", 2)]
    assert num_code_lines(path) == 2
