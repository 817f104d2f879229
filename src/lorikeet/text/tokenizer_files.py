"""Reads a tokenizer's directory: tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat templates.

The rules are those of transformers 5, so that a prompt has the ids that the model and its adapters were trained with:

- ``tokenizer.json`` decides about BOS and EOS through its post-processor; ``add_bos_token`` in the configuration has
  no say where that file exists.
- The special tokens named in the configuration are special even where ``tokenizer.json`` does not mark them.
- ``LlamaTokenizer`` of a Llama model stands for a fixed pipeline (metaspace, byte fallback) whatever normalizer an
  older ``tokenizer.json`` holds, unless that file is byte-level.
- ``clean_up_tokenization_spaces`` has no effect on BPE vocabularies.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import tokenizers

from lorikeet.errors import ModelError
from lorikeet.text.chat import named_templates

NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

_LLAMA_DEFAULTS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """What a directory says about its tokenizer.

    Attributes:
        backend: the pipeline, with every special token added.
        decoder: the decoder as JSON; None if there is none.
        named_tokens: ``bos_token``, ``eos_token``, ... -> text. Chat templates see them.
        special_ids: ids that ``skip_special_tokens`` skips.
        chat_templates: name -> Jinja source; the usual one is ``default``.
    """

    backend: tokenizers.Tokenizer
    decoder: dict[str, Any] | None
    named_tokens: dict[str, str]
    special_ids: frozenset[int]
    chat_templates: dict[str, str] = field(default_factory=dict)


def read_tokenizer_files(directory: str | Path) -> TokenizerFiles:
    """Read what a directory says about its tokenizer.

    Raises:
        ModelError: no ``tokenizer.json``, or a file that cannot be read as what it should be.
    """
    directory = Path(directory)
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            f"{directory} has no tokenizer.json; a tokenizer in another format is not supported: load it with "
            "transformers and save it again with save_pretrained, which writes that file"
        )
    config = _read_json(directory / "tokenizer_config.json")
    source = _read_text(path)
    uses_llama = _is_llama_pipeline(directory, config, source)
    if uses_llama:
        source = _llama_pipeline(source, config, path)
    try:
        backend = tokenizers.Tokenizer.from_str(source)
    except Exception as error:  # the library raises this class itself and nothing narrower
        raise ModelError(f"{path} cannot be read: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(config.get("split_special_tokens", False))

    named, extra = _special_tokens(directory, config)
    if uses_llama:
        named = {**_LLAMA_DEFAULTS, **named}
    try:
        special_ids = _add_special_tokens(backend, config, [*named.values(), *extra])
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{directory / 'tokenizer_config.json'}: added_tokens_decoder cannot be read: {error}"
        ) from error
    decoder = backend.decoder
    return TokenizerFiles(
        backend=backend,
        decoder=None if decoder is None else json.loads(decoder.__getstate__()),
        named_tokens=named,
        special_ids=special_ids,
        chat_templates=_read_chat_templates(directory, config),
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a missing file is an empty one."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} should hold a JSON object")
    return cast(dict[str, Any], value)


def _is_llama_pipeline(directory: Path, config: dict[str, Any], source: str) -> bool:
    if str(config.get("tokenizer_class", "")).removesuffix("Fast") != "LlamaTokenizer":
        return False
    model_type = _read_json(directory / "config.json").get("model_type", "llama")
    return model_type == "llama" and '"ByteLevel"' not in source


def _llama_pipeline(source: str, config: dict[str, Any], path: Path) -> str:
    """Return ``tokenizer.json`` with the pipeline of ``LlamaTokenizer`` around its vocabulary and merges."""
    try:
        data = json.loads(source)
        data["model"] |= {
            "unk_token": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "dropout": None,
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} cannot be read: {error!r}") from error
    prefix_space = config.get("add_prefix_space")
    scheme = "never"
    if prefix_space is None or prefix_space:
        scheme = "always" if config.get("legacy", False) else "first"
    data["normalizer"] = None
    data["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": scheme,
        "split": False,
    }
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if scheme != "never":
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    data["decoder"] = {"type": "Sequence", "decoders": decoders}
    return json.dumps(data, ensure_ascii=False)


def _token_text(value: object) -> str | None:
    """Text of a token written as a string or as an ``AddedToken`` object."""
    if isinstance(value, dict):
        value = cast(dict[str, object], value).get("content")
    return value if isinstance(value, str) and value else None


def _special_tokens(directory: Path, config: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Return the named special tokens and the nameless ones."""
    merged = dict(config)
    if "added_tokens_decoder" not in config:  # older directories keep them in a file of their own
        merged |= _read_json(directory / "special_tokens_map.json")
    named: dict[str, str] = {}
    for name, value in merged.items():
        text = _token_text(value)
        if text is not None and (name in NAMED_TOKENS or name.endswith("_token")):
            named[name] = text
    extra = merged.get("extra_special_tokens") or merged.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        for name, value in cast(dict[str, object], extra).items():
            named |= {name: text} if (text := _token_text(value)) else {}
        extra = []
    texts = [text for value in cast(list[object], extra) if (text := _token_text(value))]
    return named, texts


def _add_special_tokens(
    backend: tokenizers.Tokenizer, config: dict[str, Any], special: list[str]
) -> frozenset[int]:
    """Add what the configuration names and ``tokenizer.json`` lacks; return the ids of all special tokens."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    declared = sorted(
        cast(dict[str, dict[str, Any]], config.get("added_tokens_decoder") or {}).items(),
        key=lambda item: int(item[0]),
    )
    backend.add_tokens(
        [
            tokenizers.AddedToken(**token)
            for _, token in declared
            if _token_text(token) and token["content"] not in known
        ]
    )
    backend.add_special_tokens(
        [tokenizers.AddedToken(text, special=True, normalized=False) for text in special]
    )
    ids = {index for index, token in backend.get_added_tokens_decoder().items() if token.special}
    ids |= {index for text in special if (index := backend.token_to_id(text)) is not None}
    return frozenset(ids)


def _read_chat_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Files win over ``chat_template`` in the configuration, which is a string or a list of named templates."""
    files = {
        path.stem: path
        for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))
    }
    if (main := directory / "chat_template.jinja").is_file():
        files["default"] = main
    if files:
        return {name: _read_text(path) for name, path in files.items()}
    return named_templates(config.get("chat_template"), directory / "tokenizer_config.json")
