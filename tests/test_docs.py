"""The documents say what is so: generated pages, links, paths, code blocks, the changelog's version."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from lorikeet.config import OPTIONS, resolve
from lorikeet.config.parsing import Parser, add_options, config_from_args
from lorikeet.server.openai.bodies import ChatBody, CompletionBody, EmbeddingBody
from lorikeet.server.protocol import GenerateBody, LoadAdapterBody, UnloadAdapterBody
from lorikeet.utils import split_command
from scripts import check_version, write_docs

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
RECORDS = sorted((ROOT / "docs" / "decisions").glob("*.md"))

LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")
# Pages that say where things are: every path in them exists, packages and bare names of files included.
MAPS = ("docs/structure.md", "docs/glossary.md", "CONTRIBUTING.md")
PATH = re.compile(r"`(\w[\w.-]*/[\w./-]*|\w+\.py)`")
SOURCE = re.compile(r"`((?:src|tests|scripts|docs|benchmarks)/[\w./-]*\w\.\w+)`")
BODIES = (GenerateBody, LoadAdapterBody, UnloadAdapterBody, ChatBody, CompletionBody, EmbeddingBody)
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (str(page.relative_to(ROOT)), code)
        for page in PAGES
        for kind, code in FENCE.findall(page.read_text(encoding="utf-8"))
        if kind == language
    ]


def commands() -> list[list[str]]:
    """Every server command of the shell blocks, as words."""
    lines = [line for _, code in blocks("bash") for line in code.replace("\\\n", " ").splitlines()]
    return [
        split_command(line)[2:]
        for line in lines
        if line.startswith(("lorikeet serve", "lorikeet generate"))
    ]


@pytest.mark.parametrize("name", write_docs.PAGES)
def test_generated_pages_are_current(name):
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == write_docs.PAGES[name]()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    missing = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    missing += [path for path in SOURCE.findall(text) if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("page", MAPS)
def test_every_path_of_a_map_exists(page):
    files = {path.name for path in (ROOT / "src").rglob("*.py")}
    paths = PATH.findall((ROOT / page).read_text(encoding="utf-8"))
    assert not [path for path in paths if path not in files and not (ROOT / path).exists()]
    assert page == "docs/glossary.md" or len(paths) >= 5


def test_the_glossary_is_in_order():
    lines = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").splitlines()
    words = [line.split("|")[1].strip() for line in lines if line.startswith("| ")][1:]
    assert len(words) >= 50
    assert words == sorted(set(words), key=lambda word: word.replace("_", ""))


def test_there_are_blocks_to_check():
    assert len(blocks("python")) >= 2
    assert len(blocks("bash")) >= 3
    assert len(commands()) >= 2


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_python_blocks_run(page, code):
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", code],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{page}:\n{code}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:40])
def test_server_commands_are_accepted(words):
    parser = Parser(prog="test", description="test")
    add_options(parser)
    assert resolve(config_from_args(parser.parse(words))).model_path


def test_curl_bodies_are_json():
    bodies = [
        body
        for _, code in blocks("bash")
        if code.startswith("curl")
        for words in [shlex.split(code)]
        for flag, body in itertools.pairwise(words)
        if flag == "-d"
    ]
    assert len(bodies) >= 3
    known = {name for body in BODIES for name in body.model_fields}
    for body in bodies:
        assert set(json.loads(body)) <= known


def test_flags_in_the_documents_exist():
    known = {flag for option in OPTIONS.values() for flag in option.flags}
    known |= {
        "--config",
        "--help",
        "--lora",
        "--prompt",
        "--sampling-params",
        "--like-this",
        "--like_this",
    }
    known |= {"--no-flag"}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text += (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) - known == set()


def test_the_changelog_has_the_version(monkeypatch):
    assert check_version.main() == 0
    monkeypatch.setattr("lorikeet.__version__", "9.9.9")
    assert check_version.main() == 1


def test_the_newest_release_is_the_first():
    text = "## [Unreleased]\n\n## [1.2.3] - 2026-01-31\n\n## [1.2.2] - 2026-01-01\n"
    assert check_version.newest_release(text) == "1.2.3"
    assert check_version.newest_release("## [Unreleased]\n") is None


def test_decision_numbers_are_one_sequence():
    numbers = [int(path.name[:4]) for path in RECORDS]
    assert numbers == list(range(1, len(RECORDS) + 1))
    for number, path in zip(numbers, RECORDS, strict=True):
        text = path.read_text(encoding="utf-8")
        assert text.startswith(f"# {number}. ")
        headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
        assert headings[0] == "Context"
        assert headings[-2:] == ["Decision", "Consequences"]


def test_the_structure_page_names_the_rows_of_the_contract():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    rows = project["tool"]["importlinter"]["contracts"][0]["layers"]
    text = " ".join((ROOT / "docs" / "structure.md").read_text(encoding="utf-8").split())
    assert ", ".join(f"`{row}`" for row in rows) in text


def test_ci_runs_what_contributors_run():
    assert "make check test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert any(
        hook.get("entry") == "make check" for repo in hooks["repos"] for hook in repo["hooks"]
    )
