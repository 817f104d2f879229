"""Chat templates: Jinja in a sandbox, with what transformers gives a template and nothing more.

Templates come with models and adapters, so they are code of other people: they run in Jinja's immutable sandbox, and
every value they see has been rebuilt from plain JSON types, which have no methods that could do harm.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from jinja2 import nodes

from lorikeet.errors import ModelError, RequestError

# What a template may raise besides its own errors when it meets messages it was not written for.
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)

# Levels of lists and objects in a message or a tool.
MAX_DEPTH = 128

# Characters of a template's own error that our message repeats.
_MAX_WORDS = 1000

# About how many characters a message spends on the path of a value.
_MAX_PATH = 60

_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class ChatTemplates:
    """The templates of one model.

    Args:
        templates: name -> Jinja source.
        named_tokens: ``bos_token`` and so on, visible to the templates as variables.
    """

    def __init__(self, templates: Mapping[str, str], named_tokens: Mapping[str, str]) -> None:
        self._templates = dict(templates)
        self._named_tokens = dict(named_tokens)

    @property
    def names(self) -> list[str]:
        return sorted(self._templates)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Render a conversation; arguments as :meth:`Tokenizer.apply_chat_template`.

        Raises:
            RequestError: no messages, a message that is no object, no template, or a template that refuses.
        """
        source = self.pick(chat_template, has_tools=tools is not None)
        context = self.context(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            variables=variables,
        )
        return render_template(source, context)

    def context(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """What a template sees, of JSON types alone; arguments as :meth:`render`.

        Raises:
            RequestError: no messages, a message that is no object, something that is no JSON, or is nested too deeply.
        """
        if not messages:
            raise RequestError("messages is empty; give at least one message", "messages")
        context = {
            **self._named_tokens,
            **cast(dict[str, Any], _plain(dict(variables or {}), "chat_template_kwargs")),
            "messages": [_plain_message(item, index) for index, item in enumerate(messages)],
            "tools": _plain(None if tools is None else list(tools), "tools"),
            "add_generation_prompt": add_generation_prompt,
        }
        context.setdefault("documents", None)
        return context

    def pick(self, chat_template: str | None = None, *, has_tools: bool = False) -> str:
        """The Jinja source that :meth:`render` uses.

        Raises:
            RequestError: there is none.
        """
        if chat_template is not None:
            return self._templates.get(chat_template, chat_template)
        if has_tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" in self._templates:
            return self._templates["default"]
        if self._templates:
            raise RequestError(
                f"the model has several chat templates and no default one; name one of: {', '.join(self.names)}",
                "messages",
            )
        raise RequestError(
            "the model has no chat template; send a rendered prompt instead of messages", "messages"
        )


def _plain_message(message: object, index: int) -> dict[str, Any]:
    """Copy a message without its null fields (templates test for a field's presence, not for null)."""
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} is {type(message).__name__}; allowed: an object", "messages")
    given = {
        key: value for key, value in cast(Mapping[str, Any], message).items() if value is not None
    }
    plain = cast(dict[str, Any], _plain(given, where))
    reasoning = next((plain[name] for name in _REASONING_FIELDS if name in plain), None)
    if reasoning is not None:  # templates disagree about the name of this field
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _plain(value: object, where: str, depth: int = 0) -> object:
    """Rebuild a value out of JSON types.

    Raises:
        RequestError: there is something else inside, or it is nested too deeply.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth > MAX_DEPTH:
        raise RequestError(
            f"{where}: is nested too deeply; allowed: {MAX_DEPTH} levels", _field(where)
        )
    if isinstance(value, Mapping):
        items = cast(Mapping[object, object], value).items()
        return {
            str(key): _plain(item, _at(where, f".{key!s:.60}"), depth + 1) for key, item in items
        }
    if isinstance(value, list | tuple):
        entries = cast(Sequence[object], value)
        return [_plain(item, _at(where, f"[{i}]"), depth + 1) for i, item in enumerate(entries)]
    raise RequestError(f"{where} is {type(value).__name__}; allowed: JSON values", _field(where))


def _at(where: str, part: str) -> str:
    """A path for messages; its end is left out where it is long."""
    return where if len(where) > _MAX_PATH else where + part[:_MAX_PATH]


def _field(where: str) -> str:
    return where.split(".")[0].split("[")[0]


def render_template(source: str, context: Mapping[str, Any]) -> str:
    """Run a template. It may take any time and memory, so a stranger's runs only in the sandbox.

    Raises:
        RequestError: it does not compile, or refuses.
    """
    try:
        return _compile(source).render(context)
    except _TEMPLATE_FAULTS as error:
        raise RequestError(
            f"the chat template cannot render these messages: {error!s:.{_MAX_WORDS}}", "messages"
        ) from error


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks what the assistant said, for training; serving renders its contents as they are."""

    tags = {"generation"}  # noqa: RUF012  the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        scope = jinja2.nodes.Scope(body)
        return scope.set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
    """``namespace()`` without attributes that begin with an underscore, which lead out of the sandbox.

    The constructor names no parameter because a template may say ``namespace(self=...)``.
    """

    def __init__(*args: Any, **kwargs: Any) -> None:
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a chat template may not set the attribute {name!r} of a namespace"
        )


class _DictBuilder:
    """``dict`` for templates: builds dictionaries and shows nothing of the class itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002  the signature templates know
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """JSON as it is: Jinja's own filter escapes the characters of HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def named_templates(value: object, path: Path) -> dict[str, str]:
    """``chat_template`` of a tokenizer's configuration as name -> Jinja source.

    Args:
        path: of the configuration, for messages.

    Raises:
        ModelError: it has another form.
    """
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        if isinstance(value, dict):
            return {
                str(name): str(text) for name, text in cast(dict[object, object], value).items()
            }
        items = cast(list[dict[str, object]], value)
        return {str(item["name"]): str(item["template"]) for item in items}
    except (KeyError, TypeError) as error:
        raise ModelError(
            f'{path}: chat_template should be a string or a list of {{"name", "template"}}'
        ) from error


def check_template(source: str) -> None:
    """Check that a template compiles.

    Raises:
        ValueError: where and why it does not compile.
    """
    try:
        _compile(source)
    except jinja2.TemplateSyntaxError as error:
        words = f"{error.message:.{_MAX_WORDS}}"
        raise ValueError(f"line {error.lineno}: {words}") from error
    except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
        raise ValueError(f"{error!s:.{_MAX_WORDS}}" or type(error).__name__) from error


# Adapters may bring templates of their own; the memory of the workers that render them is limited.
@lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    return make_environment().from_string(source)


@lru_cache(maxsize=1)
def make_environment() -> jinja2.Environment:
    """The Jinja environment that templates are compiled in."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=_strftime_now,
        dict=_DictBuilder(),
        namespace=_Namespace,
    )
    return environment


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateFacts:
    """What one template reads, found in its syntax tree.

    Attributes:
        reads_tools: it shows tools to the model.
        words: attributes that it reads, and strings that it compares with or looks up.
        joins_arguments: it joins the arguments of a call to text, so that they must be a string; others want an object.
    """

    reads_tools: bool
    words: frozenset[str]
    joins_arguments: bool

    def knows(self, word: str) -> bool:
        """True if it handles a role or a field of this name."""
        return word in self.words


@lru_cache(maxsize=16)
def find_facts(source: str) -> TemplateFacts:
    """Find what a template reads: nothing if it cannot be parsed, which rendering it reports."""
    try:
        tree = make_environment().parse(source)
    except (jinja2.TemplateError, RecursionError):
        return TemplateFacts(reads_tools=False, words=frozenset(), joins_arguments=False)
    names = tree.find_all(nodes.Name)
    words = {node.attr for node in tree.find_all(nodes.Getattr)}
    words |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return TemplateFacts(
        reads_tools=any(node.name == "tools" and node.ctx == "load" for node in names),
        words=frozenset(words),
        joins_arguments=any(
            _is_arguments(child)
            for node in tree.find_all((nodes.Add, nodes.Concat))
            for child in node.iter_child_nodes()
        ),
    )


def _is_arguments(node: nodes.Node) -> bool:
    match node:
        case nodes.Getattr(attr="arguments"):
            return True
        case nodes.Getitem(arg=nodes.Const(value="arguments")):
            return True
    return False
