"""The text of one completion, token by token.

What :meth:`Detokenizer.push` returns never ends inside a character and never changes later; all of it and
:meth:`Detokenizer.flush` together are what decoding the tokens at once gives. Each token costs the same however long
the text has become.
"""

from __future__ import annotations

from collections.abc import Collection

from lorikeet.text.tokenizer import Tokenizer


class Detokenizer:
    """Ids of one completion to text.

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
