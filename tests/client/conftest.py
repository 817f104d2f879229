"""What the tests of the client share: asyncio as the loop, and a tokenizer whose tokens are bytes."""

from __future__ import annotations

import pytest

from lorikeet.text.tokenizer import Tokenizer
from tests.support.byte_tokenizer import save_byte_tokenizer


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))
