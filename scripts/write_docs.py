"""Write the pages of docs/ that are generated from the code. A test compares them with it."""

import json
from pathlib import Path

from lorikeet import envs
from lorikeet.config import OPTIONS, Option
from lorikeet.core.sampling import PARAMS, Param

DOCS = Path(__file__).parent.parent / "docs"

_ENVIRONMENT = """\
# Environment variables

<!-- written by scripts/write_docs.py from src/lorikeet/envs.py -->

An option on the command line wins over its variable. A boolean is one of {booleans}. An empty
variable is as one that is not set; an empty key is an error, since it would leave the server open.

| variable | default | meaning |
|---|---|---|
{rows}
"""
_OPTIONS = """\
# Options

<!-- written by scripts/write_docs.py from src/lorikeet/config/server_config.py -->

Of `lorikeet serve`, `python -m lorikeet.launch_server` and `lorikeet generate`. `--like_this` is accepted
for `--like-this`; a flag has its opposite in `--no-flag`. `--config FILE` reads the same names from YAML;
the command line wins. `lorikeet.LLM` takes them as keywords, with underscores.

| option | values | default | meaning |
|---|---|---|---|
{rows}
"""
_SAMPLING = """\
# Sampling parameters

<!-- written by scripts/write_docs.py from src/lorikeet/core/sampling.py -->

The fields of `sampling_params` in `/generate` and of `lorikeet.SamplingParams`. Bodies of the
[OpenAI API](openai.md) have them as fields of their own; the `openai` client sends those that it does not know by
`extra_body`. Null stands for the default; only `max_new_tokens: null` in `/generate` is as many as the context holds.
At most one of `json_schema`, `regex`, `ebnf` and `structural_tag` may be given.

| parameter | in the OpenAI API | values | default | what it does |
|---|---|---|---|---|
{rows}
"""
_DEFAULTS: dict[object, str] = {None: "unset", False: "`0`", True: "`1`"}


def environment_page() -> str:
    """The text of ``docs/environment.md``."""
    rows = [f"| `{v.name}` | {_DEFAULTS[v.default]} | {v.meaning} |" for v in envs.ALL]
    booleans = ", ".join(f"`{word}`" for word in envs.BOOLEANS)
    return _ENVIRONMENT.format(booleans=booleans, rows="\n".join(rows))


def options_page() -> str:
    """The text of ``docs/options.md``."""
    return _OPTIONS.format(rows="\n".join(_row(option) for option in OPTIONS.values()))


def _row(option: Option) -> str:
    flags = ", ".join(f"`{flag}`" for flag in option.flags)
    values = ", ".join(f"`{choice}`" for choice in option.allowed_values) or option.kind.summary
    return f"| {flags} | {values} | {option.default_text} | {option.meaning} |"


def sampling_page() -> str:
    """The text of ``docs/sampling.md``."""
    return _SAMPLING.format(rows="\n".join(map(_sampling_row, PARAMS.values())))


def _sampling_row(param: Param) -> str:
    openai = "the same" if param.openai == param.name else f"`{param.openai}`"
    default = "none" if param.default in (None, (), {}) else f"`{json.dumps(param.default)}`"
    cells = (f"`{param.name}`", openai if param.openai else "no", param.allowed, default)
    return f"| {' | '.join(cells)} | {param.about} |"


PAGES = {
    "environment.md": environment_page,
    "options.md": options_page,
    "sampling.md": sampling_page,
}

if __name__ == "__main__":
    for name, text in PAGES.items():
        (DOCS / name).write_text(text(), encoding="utf-8")
