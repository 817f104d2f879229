"""What a choice of a chat says: content, and calls of tools."""

from __future__ import annotations

from typing import Any

from lorikeet.server.openai.tool_parsers import Arguments, Begin, Broken, End, Event, Text
from lorikeet.server.openai.tools import ToolUse
from lorikeet.text.completion import Snapshot

Reply = dict[str, Any]


class Speech:
    """One choice's message.

    A call that breaks stays one with its arguments as far as they go: a stream has told it already, and the whole message
    says what a stream says.

    Args:
        tools: what it may call; None: its content is the text.
    """

    def __init__(self, tools: ToolUse | None) -> None:
        self._tools = tools
        self._parser = None if tools is None else tools.form.parser(tools.names)
        self._num_chars = 0
        self._num_begun = 0
        self._num_complete = 0

    @property
    def has_calls(self) -> bool:
        """A call of a tool is complete."""
        return self._num_complete > 0

    def deltas(self, snapshot: Snapshot) -> list[Reply]:
        """What is new, as the deltas of a stream."""
        return [delta for event in self._read(snapshot) if (delta := self._delta(event))]

    def message(self, snapshot: Snapshot) -> Reply:
        """The fields of the whole message beside its role, of a completion that has finished."""
        content: list[str] = []
        calls: list[Reply] = []
        for event in self._read(snapshot):
            match event:
                case Text(text):
                    content.append(text)
                case Begin(name):
                    calls.append(self._new_call(name))
                case Arguments(text):
                    calls[-1]["function"]["arguments"] += text
                case End() | Broken():
                    pass
        if not calls:
            return {"content": "".join(content)}
        return {"content": "".join(content) or None, "tool_calls": calls}

    def _new_call(self, name: str) -> Reply:
        assert self._tools is not None
        call = {"id": self._tools.form.make_id(), "type": "function"}
        return call | {"function": {"name": name, "arguments": ""}}

    def _read(self, snapshot: Snapshot) -> list[Event]:
        if self._parser is None:
            text = snapshot.text[self._num_chars :]
            self._num_chars = len(snapshot.text)
            return [Text(text)] if text else []
        events = self._parser.advance(snapshot.text, is_over=snapshot.finish is not None)
        self._num_complete += sum(isinstance(event, End) for event in events)
        return events

    def _delta(self, event: Event) -> Reply | None:
        match event:
            case Text(text):
                return {"content": text}
            case Begin(name):
                self._num_begun += 1
                return self._call(self._new_call(name))
            case Arguments(text):
                return self._call({"function": {"arguments": text}})
            case End() | Broken():
                return None

    def _call(self, fields: Reply) -> Reply:
        return {"tool_calls": [{"index": self._num_begun - 1} | fields]}
