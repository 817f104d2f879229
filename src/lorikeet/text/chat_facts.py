"""What a chat template reads, found in its syntax tree."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import jinja2
from jinja2 import nodes

from lorikeet.text.chat import make_environment


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateFacts:
    """What one template reads.

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


read_facts = lru_cache(maxsize=16)(find_facts)
""":func:`find_facts` with a cache."""
