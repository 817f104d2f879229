"""Chat templates that somebody made up: a text, or a refusal with a reason."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from lorikeet.errors import RequestError
from lorikeet.text.chat import ChatTemplates, check_template, find_facts
from tests.fuzz.conftest import Chance

VALUES = [
    *("messages", "message", "tools", "add_generation_prompt", "bos_token", "loop", "nothing", "x"),
    *(
        "1",
        "-3",
        "2.5",
        "''",
        "'a'",
        "'\\ud800'",
        "true",
        "none",
        "[]",
        "[1, 'b']",
        "{'a': 1}",
        "'é\\n'",
    ),
    *(
        "message.content",
        "message['role']",
        "messages[0]",
        "messages[-1].content",
        "x.y",
        "x.__class__",
    ),
    *("namespace(a=1)", "dict(a=1)", "range(3)", "cycler(1, 2)", "joiner()", "lipsum(n=1)", "self"),
]
OPERATORS = [
    " + ",
    " ~ ",
    " * ",
    " - ",
    " // ",
    " % ",
    " == ",
    " < ",
    " in ",
    " and ",
    " is not ",
    " ** ",
]
FILTERS = [
    *("trim", "upper", "length", "tojson", "join(',')", "first", "last", "list", "string", "int"),
    *("default('z')", "replace('a', 'b')", "reverse", "sort", "unique", "map(attribute='role')"),
    *(
        "selectattr('role')",
        "groupby('role')",
        "batch(2)",
        "indent(2)",
        "format(1)",
        "items",
        "safe",
    ),
    *("attr('__class__')", "dictsort", "sum", "round", "abs", "xmlattr", "center(9)", "nothing"),
]
TESTS = ["defined", "none", "string", "mapping", "sequence", "odd", "divisibleby(0)", "nothing"]
METHODS = [
    ".items()",
    ".split('a')",
    ".get('role')",
    ".strip()",
    ".format(1)",
    ".keys()",
    ".append(1)",
]


def draw_expression(chance: random.Random, depth: int = 0) -> str:
    kind = chance.randrange(6) if depth < 3 else 0
    inner = chance.choice(VALUES) if kind == 0 else draw_expression(chance, depth + 1)
    if kind == 1:
        return f"{inner} | {chance.choice(FILTERS)}"
    if kind == 2:
        return f"({inner}{chance.choice(OPERATORS)}{draw_expression(chance, depth + 1)})"
    if kind == 3:
        return f"{inner} is {chance.choice(TESTS)}"
    if kind == 4:
        return inner + chance.choice(METHODS)
    if kind == 5:
        return inner + chance.choice(["[0]", "[1:]", "[::-1]", "['a']", "[-1]"])
    return inner


def draw_statement(chance: random.Random, depth: int = 0) -> str:
    kind = chance.randrange(9) if depth < 3 else 0
    value = draw_expression(chance)
    inside = draw_statement(chance, depth + 1) if kind > 2 else ""
    return [
        "{{ " + value + " }}",
        chance.choice(["text", "{#", "{%- endif %}", "\ud800", "{{", "%}", "<tool_call>", "\n"]),
        "{% set x = " + value + " %}",
        "{% if " + value + " %}" + inside + "{% else %}b{% endif %}",
        "{% for message in messages %}" + inside + "{% endfor %}",
        "{% for x in " + value + " %}" + inside + "{% break %}{% endfor %}",
        "{% macro f(x) %}" + inside + "{% endmacro %}{{ f(" + value + ") }}",
        "{% generation %}" + inside + "{% endgeneration %}",
        "{% set x %}" + inside + "{% endset %}{{ raise_exception(x) }}",
    ][kind]


def draw_messages(chance: random.Random) -> list[dict[str, Any]]:
    contents: list[Any] = ["Hi", "", "{{ 1 }}", "é\n", None, [{"type": "text", "text": "a"}]]
    return [
        {"role": chance.choice(["user", "assistant", "system"]), "content": chance.choice(contents)}
        for _ in range(chance.randint(1, 3))
    ]


def test_templates(chances: Iterator[Chance]) -> None:
    num_rendered = 0
    for chance in chances:
        source = "".join(draw_statement(chance) for _ in range(chance.randint(1, 4)))
        if is_template(source):
            num_rendered += renders(source, chance)
    assert num_rendered


def is_template(source: str) -> bool:
    find_facts(source)  # of any text
    try:
        check_template(source)
    except ValueError as error:
        assert str(error).strip()  # noqa: PT017  # its class is checked
        return False
    return True


def renders(source: str, chance: random.Random) -> bool:
    try:
        text = ChatTemplates({"default": source}, {"bos_token": "<s>"}).render(
            draw_messages(chance),
            add_generation_prompt=chance.random() < 0.5,
            tools=chance.choice([None, [{"name": "f"}]]),
        )
    except RequestError as error:
        assert str(error).strip()  # noqa: PT017
        return False
    return isinstance(text, str)
