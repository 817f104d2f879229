"""Patterns of adapters: as Python's own ``re``, in bounded time and memory."""

from __future__ import annotations

import re
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorikeet.adapters import pattern_matcher, patterns
from lorikeet.adapters.pattern_matcher import PatternError, answer, is_plain
from lorikeet.adapters.patterns import MAX_SECONDS, match_patterns
from lorikeet.errors import AdapterError

PATHS = [
    "model.embed_tokens",
    *(f"model.layers.{n}.self_attn.{name}" for n in (0, 1, 11) for name in ("q_proj", "v_proj")),
    "model.visual.blocks.0.q_proj",
    "lm_head",
]

# What real configurations hold.
UNSLOTH = r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn)\.(?:(?:q_proj|v_proj)))"
LOOKAHEAD = r"^(?!.*visual).*(?:q_proj|v_proj)$"
BACKREFERENCE = r"model\.layers\.(\d)\1\..*"


def slow_answer(how: str, expressions: list[str], path: str) -> int:
    """The rule itself, one path and one pattern after the other."""
    for place, pattern in enumerate(expressions):
        if how == "whole" and re.fullmatch(pattern, path):
            return place
        if how == "end" and re.match(rf"(.*\.)?({pattern})$", path):
            return place
        if how == "layer" and (match := re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", path)):
            return int(match["idx"])
    return -1


@pytest.mark.parametrize(
    "pattern", [UNSLOTH, LOOKAHEAD, BACKREFERENCE, r"(?i:MODEL)\..*", r".*\.1\.\w+.q_proj\Z"]
)
def test_a_process_gives_what_re_gives(pattern):
    (found,) = match_patterns([("target_modules", "whole", [pattern])], PATHS)
    assert found == [slow_answer("whole", [pattern], path) for path in PATHS]
    assert set(found) == {0, -1}


def test_several_questions_at_once():
    found = match_patterns(
        [
            ("rank_pattern", "end", ["q_proj", r"layers\.1\..*"]),
            ("layers_pattern", "layer", ["h", "(layers|blocks)"]),
            ("exclude_modules", "whole", []),
        ],
        PATHS,
    )
    assert found[0] == [slow_answer("end", ["q_proj", r"layers\.1\..*"], path) for path in PATHS]
    assert found[1] == [slow_answer("layer", ["(layers|blocks)"], path) for path in PATHS]
    assert found[2] == [-1] * len(PATHS)


names = st.text("ab.0", min_size=1, max_size=6)


@given(
    st.sampled_from(["whole", "end", "layer"]),
    st.lists(names, max_size=4),
    st.lists(names, max_size=4),
)
def test_plain_patterns_without_compiling_as_with(how, expressions, paths):
    assert all(map(is_plain, expressions))
    assert answer(how, expressions, paths) == [slow_answer(how, expressions, p) for p in paths]


def test_plain_patterns_start_no_process(monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    assert match_patterns([("rank_pattern", "end", ["q_proj", "lm.head"])], PATHS)[0][-1] == 1


def test_an_adapter_that_is_read_again_starts_no_second_process(monkeypatch):
    question = [("target_modules", "whole", [r".*(lm_head|once)"])]
    first = match_patterns(question, PATHS)
    monkeypatch.setattr(subprocess, "run", None)
    assert match_patterns(question, PATHS) == first


@pytest.mark.parametrize(
    "pattern",
    [
        r"(([a-z._0-9]+)+)+X",
        r"(([a-z_]|\d|\.)+)+!",
        r"(?:[a-z_.0-9]|[a-z_.0-9]){60}!",
        r"(?P<a>.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(?P=a)!",
    ],
)
def test_a_pattern_that_tries_for_ever_is_stopped(pattern, monkeypatch):
    field, how = "alpha_pattern", "end"
    monkeypatch.setattr(patterns, "MAX_SECONDS", 1)
    long_paths = [path.replace("model", "model.language_model") + "a" * 40 for path in PATHS]
    with pytest.raises(AdapterError) as caught:
        match_patterns([(field, how, [pattern])], long_paths)
    assert str(caught.value).startswith(f"{field}: the pattern '{pattern}' takes too long")
    assert "1 s" in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("(q", "unterminated"),
        ("a{99999999999}", "too large"),
        ("(?i)q_proj", "global flags"),
        ("(" * 20_000, "is not a regular expression"),
        ("(?P<idx>x)", "redefinition"),
        (r"\1(x)", "group reference"),
        ("(?\ud800)", "is not a regular expression"),
    ],
)
def test_what_is_no_pattern(pattern, says):
    with pytest.raises(AdapterError, match=says) as caught:
        match_patterns([("layers_pattern", "layer", [pattern])], PATHS)
    message = str(caught.value)
    assert message.startswith("layers_pattern: the pattern ")
    assert len(message.encode()) < 500


def test_a_pattern_that_takes_all_memory(monkeypatch):
    monkeypatch.setattr(patterns, "MAX_BYTES", 60 << 20)
    with pytest.raises(AdapterError, match=r"^target_modules: the pattern .* memory"):
        match_patterns([("target_modules", "whole", ["(?:ab|[cd]){2}" * 60_000])], PATHS)


def test_a_choice_that_is_no_layer_is_no_layer():
    assert answer("layer", ["layers|x"], ["model.layers.0.q", "x.1.q"]) == [-1, 1]
    with pytest.raises(PatternError):
        answer("whole", ["("], ["a"])


def test_a_process_that_cannot_start_or_ends(monkeypatch):
    monkeypatch.setattr(pattern_matcher, "__file__", "/no/such/file.py")
    with pytest.raises(AdapterError, match=f"{MAX_SECONDS} s"):
        match_patterns([("target_modules", "whole", ["(never)+"])], PATHS)
    monkeypatch.setattr("sys.executable", "/no/such/python")
    with pytest.raises(AdapterError, match="No such file"):
        match_patterns([("target_modules", "whole", ["(never)+"])], PATHS)
