"""What templates read, and the form of the calls that they write."""

from __future__ import annotations

import pytest

from lorikeet.server.openai.tool_parsers import HermesParser, Llama3Parser, MistralParser
from lorikeet.server.openai.tools import ToolForm, find_form
from lorikeet.text.chat import find_facts
from tests.support.tool_templates import HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, PLAIN, XML


@pytest.mark.parametrize("template", [HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, XML])
def test_templates_that_read_tools(template: str) -> None:
    assert find_facts(template).reads_tools


@pytest.mark.parametrize(
    "template",
    [
        PLAIN,
        "{# tools #}the tools",
        "{{ 'tools' }}",
        "{% set tools = 1 %}",
        "{{ messages.tools }}",
        "{{",
    ],
)
def test_templates_that_do_not(template: str) -> None:
    assert not find_facts(template).reads_tools


def test_a_template_may_name_its_tools_first() -> None:
    assert find_facts("{% if x %}{% set tools = x %}{% endif %}{{ tools }}").reads_tools


def test_words() -> None:
    facts = find_facts(HERMES)
    assert facts.knows("tool")
    assert facts.knows("tool_calls")
    assert not facts.knows("developer")
    # Text around the expressions is no comparison.
    assert not find_facts("a developer").knows("developer")
    assert find_facts("{{ m['tool_calls'] }}").knows("tool_calls")


def test_arguments_as_a_string() -> None:
    assert find_facts(MISTRAL_ARGS).joins_arguments
    assert find_facts("{{ 'a' ~ call.arguments }}").joins_arguments
    for template in (HERMES, LLAMA3, MISTRAL, "{{ 'a' + (call.arguments | tojson) }}"):
        assert not find_facts(template).joins_arguments


def parser_of(form: ToolForm | None) -> type | None:
    return None if form is None else form.parser


def test_forms() -> None:
    detected = {
        HERMES: HermesParser,
        LLAMA3: Llama3Parser,
        MISTRAL: MistralParser,
        MISTRAL_ARGS: MistralParser,
    }
    for template, parser in detected.items():
        assert parser_of(find_form(None, template)) is parser
    assert parser_of(find_form(None, "{{ '<|python_tag|>' }}")) is Llama3Parser
    for template in (PLAIN, XML, "{{ tools }}"):
        assert find_form(None, template) is None
    names = {
        "hermes": HermesParser,
        "qwen": HermesParser,
        "qwen25": HermesParser,
        "llama3": Llama3Parser,
        "mistral": MistralParser,
    }
    for name, parser in names.items():
        assert parser_of(find_form(name, PLAIN)) is parser
    assert find_form("mistral", MISTRAL_ARGS) != find_form("mistral", MISTRAL)
