"""The forms in which models write calls of tools: which parser reads one, and which grammar admits nothing else."""

from __future__ import annotations

import json
import re
import secrets
import string
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorikeet.server.openai.tool_parsers import (
    HermesParser,
    Llama3Parser,
    MistralParser,
    ToolCallParser,
)

Format = dict[str, Any]
"""A format of a structural tag."""

# A model that writes white space for ever would never come to its arguments.
_MAX_WHITESPACE = 64
_ID_CHARACTERS = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolForm:
    """One form.

    Attributes:
        begin, end: what surrounds the arguments; ``%s`` stands for the tool's name.
        separator: between two calls.
        opening, closing: around all calls.
        is_bare: calls are the first thing of an output, without a marker.
        id_length: of the ids that the model's template accepts; None: any.
    """

    parser: type[ToolCallParser]
    begin: str
    end: str = "}"
    separator: str
    opening: str = ""
    closing: str = ""
    is_bare: bool = False
    id_length: int | None = None

    @property
    def markers(self) -> tuple[str, ...]:
        """What may be special tokens and must be seen."""
        return (*self.parser.markers, *self.parser.other_markers)

    def make_id(self) -> str:
        """An id for a call."""
        if self.id_length is None:
            return f"call_{uuid.uuid4().hex}"
        return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(self.id_length))

    def grammar(self, schemas: Mapping[str, Format], *, must_call: bool, parallel: bool) -> str:
        """The structural tag of outputs whose calls are of these tools.

        Args:
            schemas: name -> JSON schema of its arguments.
            must_call: nothing but calls, at least one; else text may come first, or alone.
            parallel: several calls are allowed.
        """
        calls = self._calls(schemas, parallel=parallel)
        return json.dumps(
            {"type": "structural_tag", "format": calls if must_call else self._or_text(calls)}
        )

    def _calls(self, schemas: Mapping[str, Format], *, parallel: bool) -> Format:
        tags = [
            {
                "type": "tag",
                "begin": self.begin % name,
                "content": {
                    "type": "json_schema",
                    "json_schema": schema,
                    "max_whitespace_cnt": _MAX_WHITESPACE,
                },
                "end": self.end,
            }
            for name, schema in schemas.items()
        ]
        calls: Format = {
            "type": "tags_with_separator",
            "tags": tags,
            "separator": self.separator,
            "at_least_one": True,
            "stop_after_first": not parallel,
        }
        if not self.opening:
            return calls
        return _sequence(_constant(self.opening), calls, _constant(self.closing))

    def _or_text(self, calls: Format) -> Format:
        text: Format = {"type": "any_text", "excludes": list(self.parser.markers)}
        if not self.is_bare:
            return _either(text, _sequence(text, calls))
        # Where the first character decides, text begins with one that no call begins with.
        first: Format = {"type": "regex", "pattern": r"[^{<\s]"}
        marked = [_sequence(_constant(marker), calls) for marker in self.parser.markers]
        return _either(_sequence(first, text), calls, *marked)


def _constant(value: str) -> Format:
    return {"type": "const_string", "value": value}


def _sequence(*elements: Format) -> Format:
    return {"type": "sequence", "elements": list(elements)}


def _either(*elements: Format) -> Format:
    return {"type": "or", "elements": list(elements)}


_HERMES = ToolForm(
    parser=HermesParser,
    begin='<tool_call>\n{"name": "%s", "arguments": ',
    end="}\n</tool_call>",
    separator="\n",
)
_LLAMA3 = ToolForm(
    parser=Llama3Parser, begin='{"name": "%s", "parameters": ', separator="; ", is_bare=True
)
_MISTRAL = ToolForm(
    parser=MistralParser,
    begin='{"name": "%s", "arguments": ',
    separator=", ",
    opening="[TOOL_CALLS] [",
    closing="]",
    id_length=9,
)
_MISTRAL_ARGS = ToolForm(
    parser=MistralParser, begin="[TOOL_CALLS]%s[ARGS]", end="", separator="", id_length=9
)

# Names of --tool-call-parser.
_FORMS = {
    "hermes": _HERMES,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
    "qwen": _HERMES,
    "qwen25": _HERMES,
}
# Jinja strings may have escaped quotes.
_ARGUMENTS = re.compile(r'\\?"arguments\\?":')
_NAME = re.compile(r'\{\\?"name\\?":')
_PARAMETERS = re.compile(r'\\?"parameters\\?":')


def find_form(parser: str | None, template: str) -> ToolForm | None:
    """The form of a model's calls; None if it cannot be told.

    Args:
        parser: the value of ``--tool-call-parser``; None: the template decides.
        template: Jinja source that writes calls as the model does.
    """
    name = parser or _detect(template)
    if name == "mistral" and "[ARGS]" in template:
        return _MISTRAL_ARGS
    return None if name is None else _FORMS[name]


def _detect(template: str) -> str | None:
    if "[TOOL_CALLS]" in template:
        return "mistral"
    # Others put XML between these tags.
    if "<tool_call>" in template:
        return "hermes" if _ARGUMENTS.search(template) else None
    if "<|python_tag|>" in template or _has_both(template):
        return "llama3"
    return None


def _has_both(template: str) -> bool:
    """A name, and parameters somewhere behind it. In one expression it would be quadratic."""
    name = _NAME.search(template)
    return name is not None and _PARAMETERS.search(template, name.end()) is not None
