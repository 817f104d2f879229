"""What must not load torch does not, when it really runs.

The contracts in pyproject.toml see the imports that are written in the package; this sees those that happen, through
other packages too.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "triton", "xgrammar", "peft")

HTTP_PROCESS = ["server.app", "client.client", "text.tokenizer", "client.intake", "client.reply"]
COMMAND_LINE = ["cli", "launch_server", "demo_run", "utils", "config.parsing"]
DECISIONS = [
    *("core.request", "core.sequence", "core.plan", "core.messages", "core.sites"),
    *("config", "metrics", "models.spec", "scheduler.scheduler"),
    *("kv.pages", "kv.radix", "kv.manager"),
    *("adapters.spec", "adapters.targets", "adapters.registry", "adapters.tiers"),
    *("adapters.residency", "adapters.rank_pages", "adapters.layout", "adapters.sources.source"),
    *("adapters.store", "adapters.limits", "core.adapters"),
]


def loaded(modules: list[str]) -> list[str]:
    """Which heavy packages are loaded after importing the modules in a fresh interpreter."""
    names = [f"lorikeet.{module}" for module in modules]
    code = (
        "import importlib, sys\n"
        f"for name in {names}: importlib.import_module(name)\n"
        f"print(*(name for name in {HEAVY} if name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("modules", [HTTP_PROCESS, COMMAND_LINE], ids=["http", "command"])
def test_a_process_stays_light(modules):
    assert loaded(modules) == []


def test_decisions_stay_light():
    assert loaded(DECISIONS) == []


def test_the_package_itself_stays_light():
    assert loaded(["errors"]) == []


def test_the_probe_sees_what_is_loaded():
    assert "torch" in loaded(["attention.sdpa"])


ROOT = Path(__file__).parent.parent
# Parts of a dependency under their own name, and what is used only where it is there.
PARTS = {"starlette": "fastapi", "pydantic-core": "pydantic"}
OPTIONAL = {"ipython", "triton", "flashinfer-python", "fsspec", "aiohttp"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported_packages() -> set[str]:
    """The distributions that the package imports, whether at the top of a module or inside a function."""
    names: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
    names -= {*sys.stdlib_module_names, "lorikeet"}
    found = packages_distributions()
    packages = {canonical(dist) for name in names for dist in found.get(name, [name])}
    return {PARTS.get(package, package) for package in packages}


def test_dependencies_are_what_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {canonical(re.split(r"[ ><=;\[]", text)[0]) for text in project["dependencies"]}
    assert imported_packages() - OPTIONAL == declared
