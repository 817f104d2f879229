"""Text to token ids and back, and chat templates, over the ``tokenizers`` library.

The HTTP process must not import torch, which transformers does; this module gives the same ids and texts as
transformers' fast tokenizers do (the tests compare them) without it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from lorikeet.errors import RequestError
from lorikeet.text.bound import text_bound
from lorikeet.text.chat import ChatTemplates
from lorikeet.text.streams import StreamFactory, TextStream, byte_level_bytes
from lorikeet.text.tokenizer_files import TokenizerFiles, read_tokenizer_files

# Tokens whose text is remembered: log-probabilities name the same few over and over.
_NUM_REMEMBERED = 2**16


class Tokenizer:
    """A model's tokenizer. Safe to share between threads: nothing changes after the constructor.

    Args:
        files: what :func:`read_tokenizer_files` found.
        where: the directory, for messages.

    Raises:
        ModelError: the decoder is of a kind that cannot be streamed.
    """

    def __init__(self, files: TokenizerFiles, where: str) -> None:
        self._backend = files.backend
        self._special_ids = files.special_ids
        self._special_texts = frozenset(
            text for index in files.special_ids if (text := files.backend.id_to_token(index))
        )
        self._streams = StreamFactory(files.decoder, f"{where}/tokenizer.json")
        self._chat = ChatTemplates(files.chat_templates, files.named_tokens)
        self._named_tokens = files.named_tokens
        self._bound = text_bound(files.backend)
        self._texts = lru_cache(_NUM_REMEMBERED)(self._find_text)
        self._bytes = lru_cache(_NUM_REMEMBERED)(self._find_bytes)

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Load the tokenizer of a model's directory.

        Raises:
            ModelError: there is no ``tokenizer.json``, or a file is broken, or its decoder is not supported.
        """
        return cls(read_tokenizer_files(directory), str(directory))

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens that ``skip_special_tokens`` leaves out."""
        return self._special_ids

    def chat_templates(self, own: Mapping[str, str] | None = None) -> ChatTemplates:
        """Templates from ``own`` (name -> Jinja source), with this model's named tokens; the model's own without any."""
        return ChatTemplates(own, self._named_tokens) if own else self._chat

    def ids_of(self, texts: Iterable[str]) -> frozenset[int]:
        """Ids of those texts that are one token."""
        found = (self._backend.token_to_id(text) for text in texts)
        return frozenset(index for index in found if index is not None)

    def least_tokens(self, text: str) -> int:
        """Fewest tokens that a text can have, from its length; 0 if the tokenizer has no such bound.

        Raises:
            RequestError: as :meth:`encode`.
        """
        if self._bound is None:
            return 0
        try:
            return self._bound.least_tokens(text)
        except UnicodeEncodeError as error:
            raise _not_unicode(text) from error

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Other threads run meanwhile.

        Args:
            add_special_tokens: apply the post-processor (BOS and the like). Off for rendered chat templates, which
                write those tokens themselves.

        Raises:
            RequestError: the text holds half of a surrogate pair, which is no character.
        """
        try:
            # The library's encode() holds the interpreter's lock, and keeps where each token is in the text.
            (encoding,) = self._backend.encode_batch_fast(
                [text], add_special_tokens=add_special_tokens
            )
        except TypeError as error:
            raise _not_unicode(text) from error
        return encoding.ids

    def decode(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """Text of token ids, taken as a whole text of their own; ids without a token stand for nothing.

        Args:
            spaces_between_special_tokens: only matters for tokenizers that join tokens by spaces (those without a
                decoder); no other kind puts spaces around special tokens. False leaves them out there.
        """
        if spaces_between_special_tokens or not self._streams.joins_with_spaces:
            return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        stream = self.open_stream(continues=False, spaces_between_special_tokens=False)
        visible = self.visible_tokens(token_ids, skip_special_tokens=skip_special_tokens)
        return "".join([*map(stream.push, visible), stream.flush()])

    def visible_tokens(
        self,
        token_ids: Iterable[int],
        *,
        skip_special_tokens: bool,
        except_for: Collection[int] = (),
    ) -> Iterable[str]:
        """The vocabulary's spelling of those ids that contribute to a text; ``except_for`` are never skipped."""
        skipped = self._special_ids if skip_special_tokens else ()
        for token_id in token_ids:
            if token_id in skipped and token_id not in except_for:
                continue
            token = self._backend.id_to_token(token_id)
            if token is not None:
                yield token

    def open_stream(self, *, continues: bool, spaces_between_special_tokens: bool) -> TextStream:
        """A stream from the vocabulary's spelling of tokens to text.

        Args:
            continues: text comes before, so that a word's leading space is kept (see :class:`Detokenizer`).
        """
        specials = frozenset[str]() if spaces_between_special_tokens else self._special_texts
        return self._streams.open(is_first=not continues, tight=specials.__contains__)

    def token_text(self, token_id: int) -> str:
        """Text of one token as it appears inside a text; U+FFFD where it is part of a character."""
        return self._texts(token_id)

    def _find_text(self, token_id: int) -> str:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return ""
        stream = self.open_stream(
            continues=not self._streams.joins_with_spaces, spaces_between_special_tokens=True
        )
        return stream.push(token) + stream.flush()

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token; those of a character split over several tokens concatenate to it."""
        return self._bytes(token_id)

    def _find_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is not None and self._streams.is_byte_level:
            return byte_level_bytes(token)
        if token is not None and len(token) == 6 and token.startswith("<0x"):
            return bytes.fromhex(token[3:5])
        return self.token_text(token_id).encode("utf-8")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """Render a conversation as the prompt that the model was trained on.

        Encode the result with ``add_special_tokens=False``: the template has written BOS already.

        Args:
            messages: objects with ``role``, ``content`` and whatever the template reads.
            add_generation_prompt: end with the beginning of the assistant's turn.
            tools: JSON schemas of functions, for templates that know them.
            chat_template: Jinja source, or the name of one of the model's templates; the model's own if None.
            variables: further variables of the template.

        Raises:
            RequestError: there is no template, or it refuses these messages (with its own words).
        """
        return self._chat.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            chat_template=chat_template,
            variables=variables,
        )


class Detokenizer:
    """Ids of one completion to text, token by token.

    What :meth:`push` returns never ends inside a character and never changes later; all of it and :meth:`flush` together
    are what decoding the tokens at once gives. Each token costs the same however long the text has become.

    Args:
        tokenizer: the model's.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: see :meth:`Tokenizer.decode`.
        continues: the prompt has visible text, so this is the continuation of a text. Metaspace vocabularies drop the
            space before the first word of a text; in a continuation it is kept, so that prompt and completion written
            one after the other are the text of their tokens. With False the text is that of the tokens alone.
        except_for: special tokens that are part of the text all the same.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        continues: bool = False,
        except_for: Collection[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._except_for = except_for
        self._stream = tokenizer.open_stream(
            continues=continues, spaces_between_special_tokens=spaces_between_special_tokens
        )

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that became final with it, often empty within a character."""
        tokens = self._tokenizer.visible_tokens(
            (token_id,), skip_special_tokens=self._skip, except_for=self._except_for
        )
        return "".join(map(self._stream.push, tokens))

    def peek(self) -> str:
        """Text that is complete and held back only because a later token could still spoil it; changes nothing."""
        return self._stream.peek()

    def flush(self) -> str:
        """No token follows: return the rest, with U+FFFD for what did not become a character."""
        return self._stream.flush()


def _not_unicode(text: str) -> RequestError:
    return RequestError(f"the text is not valid Unicode: {text[:100]!r:.100}")
