"""Chat templates in the sandbox: they are code of whoever wrote the adapter, and what they read is a stranger's, too.

A worker compiles and renders; it is used for many jobs, which see nothing of each other: templates are kept by their
source, cannot change what they are given, and each rendering has a context of its own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast
from weakref import WeakValueDictionary

from lorikeet.errors import AdapterError, ModelError, RequestError
from lorikeet.sandbox import Handler, JobLimits, LimitError, Sandbox
from lorikeet.text.chat import (
    TemplateFacts,
    check_template,
    find_facts,
    named_templates,
    render_template,
)

LIMITS = JobLimits(
    # Templates take milliseconds. Workers have a low priority, so that on a busy machine a little work takes long.
    wall_seconds=5.0,
    cpu_seconds=1.0,
    memory_bytes=256 * 2**20,
)
"""What one template may take to compile and to render."""

MAX_TEMPLATE = 256 * 1024
"""Characters of one adapter's templates, which the HTTP process keeps for every adapter; known ones have up to 30,000."""

NUM_WORKERS = 4
# Workers that one template may occupy, so that others find one at any time unless several are slow.
NUM_PER_TEMPLATE = 2
# A worker's memory is limited, so it must not keep for ever what earlier jobs brought.
_JOBS_PER_WORKER = 500
# Templates whose facts are remembered.
_NUM_FACTS = 256
# Longer than any word that is looked for in a template.
_MAX_WORD = 100

Templates = dict[str, str]
"""Name -> Jinja source; the usual one is ``default``."""


class TemplateSandbox:
    """Compiles and renders templates; from any thread. Its processes start when they are first needed."""

    def __init__(self, limits: JobLimits = LIMITS) -> None:
        self._sandbox = Sandbox(
            "lorikeet.text.template_sandbox:prepare",
            {},
            limits=limits,
            num_workers=NUM_WORKERS,
            jobs_per_worker=_JOBS_PER_WORKER,
            name="templates",
        )
        self._turns = WeakValueDictionary[str, asyncio.Semaphore]()
        self._facts: dict[str, TemplateFacts] = {}

    def close(self) -> None:
        """End the processes."""
        self._sandbox.close()

    def read(self, path: Path, data: bytes, *, is_config: bool) -> Templates:
        """Read the templates in an adapter's file, and check that they compile.

        Args:
            is_config: it is a ``tokenizer_config.json``, not a template.

        Raises:
            AdapterError: names the file, and what is wrong with it.
        """
        try:
            work = ["read", _encodable(str(path)), data, is_config]
            answer = _value(self._sandbox.submit(work).future.result())
        except LimitError as error:
            raise AdapterError(f"{path}: the chat template cannot be used: {error}") from error
        except RequestError as error:
            raise AdapterError(str(error)) from error
        return cast(Templates, answer)

    async def facts(self, source: str, whose: str) -> TemplateFacts:
        """What a template reads.

        Args:
            whose: whose template it is, for messages: "the chat template of ...".

        Raises:
            RequestError: it takes too much.
        """
        facts = self._facts.get(source)
        if facts is None:
            answer = cast("list[Any]", await self._ask(source, whose, ["facts", source]))
            facts = TemplateFacts(
                reads_tools=answer[0], words=frozenset(answer[1]), joins_arguments=answer[2]
            )
            while len(self._facts) >= _NUM_FACTS:
                del self._facts[next(iter(self._facts))]
            self._facts[source] = facts
        return facts

    async def render(
        self, source: str, context: Mapping[str, Any], *, whose: str, most: int
    ) -> str:
        """Render a template. If the caller is cancelled, so is the work.

        Args:
            context: as :meth:`ChatTemplates.context` makes it.
            whose: as for :meth:`facts`.
            most: characters of the result.

        Raises:
            RequestError: it does not compile, refuses in its own words, or takes too much.
        """
        return cast(str, await self._ask(source, whose, ["render", source, context, most]))

    async def _ask(self, source: str, whose: str, work: list[Any]) -> Any:
        turn = self._turns.get(source)
        if turn is None:
            turn = self._turns[source] = asyncio.Semaphore(NUM_PER_TEMPLATE)
        async with turn:
            job = self._sandbox.submit(work)
            try:
                return _value(await asyncio.wrap_future(job.future))
            except asyncio.CancelledError:
                job.cancel()
                raise
            except LimitError as error:
                raise RequestError(f"{whose} cannot be used: {error}", "messages") from error


def _value(answer: Any) -> Any:
    """The result in an answer. Raises RequestError if the answer is a refusal."""
    value, refusal = answer
    if refusal is not None:
        raise RequestError(str(refusal), "messages")
    return value


# --------------------------------------------------------------------------------------------------------------------
# In the workers.


def prepare() -> Handler:
    """The handler for :class:`Sandbox`. A refusal is an answer, not an exception, so that the worker survives it:
    templates refuse often."""

    def handle(work: list[Any]) -> tuple[object, str | None]:
        kind, *args = work
        try:
            return _WORK[kind](*args), None
        except (RequestError, AdapterError) as error:
            return None, _encodable(str(error))

    return handle


def _render(source: str, context: dict[str, Any], most: int) -> str:
    text = render_template(source, context)
    if len(text) > most:
        raise RequestError(
            f"the chat template makes {len(text):,} characters of these messages; allowed: {most:,}"
        )
    _check_encodable(text, "what the chat template makes of these messages")
    return text


def _facts(source: str) -> tuple[bool, list[str], bool]:
    facts = find_facts(source)
    words = [word for word in facts.words if len(word) <= _MAX_WORD]
    return facts.reads_tools, list(map(_encodable, words)), facts.joins_arguments


def _read(where: str, data: bytes, is_config: bool) -> Templates:  # noqa: FBT001  # jobs are lists
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise AdapterError(f"{where} is not UTF-8: {error}") from error
    templates = _named(text, where) if is_config else {"default": text}
    num = sum(len(name) + len(source) for name, source in templates.items())
    if num > MAX_TEMPLATE:
        raise AdapterError(
            f"{where}: the chat templates have {num:,} characters; allowed: {MAX_TEMPLATE:,}"
        )
    for name, source in templates.items():
        _check_encodable(name, f"{where}: the name of a chat template")
        named = "" if name == "default" else f" {name!r:.100}"
        whose = f"{where}: the chat template{named}"
        _check_encodable(source, whose)
        try:
            check_template(source)
        except ValueError as error:
            raise AdapterError(f"{whose} cannot be used: {error}") from error
    return templates


def _named(text: str, where: str) -> Templates:
    try:
        config: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{where} should hold a JSON object")
    try:
        return named_templates(cast(dict[str, Any], config).get("chat_template"), Path(where))
    except ModelError as error:
        raise AdapterError(str(error)) from error


def _check_encodable(text: str, what: str) -> None:
    if _encodable(text) != text:
        raise AdapterError(f"{what} holds half of a surrogate pair, which is no character")


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


_WORK = {"render": _render, "facts": _facts, "read": _read}
