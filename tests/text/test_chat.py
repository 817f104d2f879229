"""Templates render as in transformers, see nothing but plain data, and refuse in their own words."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lorikeet.errors import RequestError
from lorikeet.text.chat import MAX_DEPTH, ChatTemplates

MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "a <b> & 'c' é"},
    {"role": "assistant", "content": "x", "reasoning": "because"},
    {"role": "user", "content": [{"type": "text", "text": "part"}]},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": [True, None]}}}]

TEMPLATES = {
    "blocks": "{% for m in messages %}\n  {% if loop.first %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}\nend",
    "json": "{{ messages | tojson }}{{ tools | tojson(indent=2) }}{{ 'é' | tojson(ensure_ascii=true) }}",
    "sorted json": "{{ tools | tojson(sort_keys=true, separators=(',', ':')) }}",
    "loop controls": "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}|{% endfor %}",
    "generation scope": "{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{% endgeneration %}{{ a }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "namespace self": "{{ namespace(self=3).self }}",
    "dict": "{{ dict(a=1).a }}{{ dict.fromkeys('ab', 0) | tojson }}",
    "date": "{{ strftime_now('%Y') }}",
    "specials": "{{ bos_token }}{{ eos_token }}{{ unk_token is defined }}",
    "variables": "{{ enable_thinking }}{{ documents is none }}{{ tools | length }}",
    "reasoning": "{{ messages[1].reasoning_content }}{{ messages[1].thinking }}",
    "prompt": "{% if add_generation_prompt %}go{% endif %}",
    "slices": "{{ messages[::-1][0].role }}{{ messages[0].content.split('<')[0].strip() }}",
    "macro": "{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m(1) }}",
}


def render(template: str, messages: list[Any] | None = None, **variables: Any) -> str:
    templates = ChatTemplates({"default": template}, {"bos_token": "<s>", "eos_token": "</s>"})
    return templates.render(
        MESSAGES if messages is None else messages,
        add_generation_prompt=True,
        tools=TOOLS,
        variables=variables,
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers_does(name: str) -> None:
    template = TEMPLATES[name]
    expected, _ = render_jinja_template(
        conversations=[MESSAGES],
        tools=TOOLS,  # type: ignore[arg-type]  annotated as list of dict or Callable, which is invariant
        chat_template=template,
        add_generation_prompt=True,
        bos_token="<s>",
        eos_token="</s>",
        enable_thinking=False,
    )
    assert render(template, enable_thinking=False) == expected[0]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "cannot render"),
        ("{{ messages[9].content }}", "cannot render"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content + 1 }}", "cannot render"),
        ("{{ missing.field }}", "'missing' is undefined"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ messages.append(1) }}", "cannot render"),
        ("{{ namespace(_x=1) }}", "may not set the attribute '_x'"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "may not set the attribute '_x'"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ raise_exception.__globals__.x }}", "unsafe"),
        ("{{ '%s' % strftime_now.__globals__.x }}", "unsafe"),
    ],
)
def test_a_template_that_fails_is_an_error_of_the_request(template: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        render(template)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages is empty; give at least one message"),
        (["hi"], r"messages\[0\] is str; allowed: an object"),
        (
            [{"role": "user", "content": object()}],
            r"messages\[0\].content is object; allowed: JSON",
        ),
        ([{"role": "user", "content": [b"x"]}], r"messages\[0\].content\[0\] is bytes"),
    ],
)
def test_messages_must_be_plain_data(messages: list[Any], words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        render("{{ messages }}", messages)
    assert caught.value.param == "messages"


def test_null_fields_count_as_absent() -> None:
    messages = [{"role": "assistant", "content": None, "tool_calls": None}]
    assert render("{{ messages[0] | tojson }}", messages) == '{"role": "assistant"}'


def test_the_callers_messages_are_not_changed() -> None:
    messages = [{"role": "assistant", "content": "x", "reasoning": "r"}]
    render("{{ messages[0].update({'content': 1}) if false else '' }}", messages)
    assert messages == [{"role": "assistant", "content": "x", "reasoning": "r"}]


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = {"a": [value]} if isinstance(value, list) else [value]
    return value


def test_messages_have_so_many_levels() -> None:
    message = {"role": "user", "content": nested(MAX_DEPTH // 2)}
    assert render("{{ messages[0].role }}", [message]) == "user"
    for depth in (MAX_DEPTH, 100_000):
        message = {"role": "user", "content": nested(depth)}
        with pytest.raises(
            RequestError, match=f"nested too deeply; allowed: {MAX_DEPTH}"
        ) as caught:
            render("{{ messages }}", [message])
        assert caught.value.param == "messages"
        assert len(str(caught.value)) < 300


def test_long_keys_are_not_copied_for_each_value() -> None:
    value = {"k" * 1_000_000: [[[None]]] * 20_000}
    assert render("{{ messages | length }}", [{"role": "user", "content": value}]) == "1"
    with pytest.raises(RequestError) as caught:
        render("{{ messages }}", [{"role": "user", "content": {"k" * 1_000_000: [[b""]]}}])
    assert len(str(caught.value)) < 300


def test_a_templates_own_words_are_cut() -> None:
    for template in ("{{ raise_exception('x' * 1000000) }}", "{% " + "x" * 1_000_000 + " %}"):
        with pytest.raises(RequestError) as caught:
            render(template)
        assert "xxx" in str(caught.value)
        assert len(str(caught.value)) < 1200
