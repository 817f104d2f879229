"""Tokenizer directories as they occur in published models: old and new files, odd configurations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from tests.support.tokenizers import make_tokenizer, write_config


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    write_config(directory, {name: value for name, value in config.items() if value != "absent"})


def edit_backend(directory: Path, change: Callable[[Backend], None]) -> None:
    path = str(directory / "tokenizer.json")
    backend = Backend.from_file(path)
    change(backend)
    backend.save(path)


def prepend_normalizer(backend: Backend) -> None:
    """The form in which the first Llama tokenizers were published."""
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    set_null(backend, "pre_tokenizer")


def set_null(backend: Backend, part: str) -> None:
    setattr(backend, part, None)


def llama3_post_processor(backend: Backend) -> None:
    bos = backend.token_to_id("<|bos|>")
    template = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A <|bos|> $B", special_tokens=[("<|bos|>", bos)]
    )
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), template]
    )


def qwen_pipeline(backend: Backend) -> None:
    backend.normalizer = normalizers.NFC()


def model_type(directory: Path, name: str) -> None:
    (directory / "config.json").write_text(json.dumps({"model_type": name}))


def variant_plain(directory: Path) -> None:
    make_tokenizer(directory, "bytelevel")


def variant_llama3(directory: Path) -> None:
    make_tokenizer(directory, "bytelevel")
    edit_backend(directory, llama3_post_processor)
    model_type(directory, "llama")


def variant_llama_class_bytelevel(directory: Path) -> None:
    variant_llama3(directory)
    edit_config(directory, tokenizer_class="LlamaTokenizerFast", add_bos_token=False)


def variant_no_post_processor(directory: Path) -> None:
    make_tokenizer(directory, "bytelevel")
    edit_backend(directory, lambda backend: set_null(backend, "post_processor"))
    edit_config(directory, add_bos_token=True, add_eos_token=True)


def variant_qwen(directory: Path) -> None:
    make_tokenizer(directory, "bytelevel")
    edit_backend(directory, qwen_pipeline)
    model_type(directory, "qwen3")


def variant_metaspace(directory: Path) -> None:
    make_tokenizer(directory, "metaspace")
    model_type(directory, "llama")


def variant_llama2_as_published(directory: Path) -> None:
    make_tokenizer(directory, "metaspace")
    edit_backend(directory, prepend_normalizer)
    edit_config(directory, add_bos_token=True, add_eos_token=False)
    model_type(directory, "llama")


def variant_llama_legacy(directory: Path) -> None:
    variant_llama2_as_published(directory)
    edit_config(directory, legacy=True, bos_token={"content": "<s>", "__type": "AddedToken"})


def variant_llama_legacy_absent(directory: Path) -> None:
    variant_llama2_as_published(directory)
    edit_config(directory, legacy="absent", bos_token="absent", eos_token="absent")


def variant_llama_no_prefix_space(directory: Path) -> None:
    make_tokenizer(directory, "metaspace")
    edit_config(directory, add_prefix_space=False)


def variant_mistral(directory: Path) -> None:
    """The same file under another model type keeps its own pipeline."""
    variant_llama2_as_published(directory)
    model_type(directory, "mistral")


def variant_unmarked_specials(directory: Path) -> None:
    make_tokenizer(directory, "bytelevel")
    path = directory / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["added_tokens"] = data["added_tokens"][3:]
    path.write_text(json.dumps(data), encoding="utf-8")
    edit_config(directory, extra_special_tokens=["<|new|>", "Paris"])


def variant_old_special_map(directory: Path) -> None:
    make_tokenizer(directory, "bytelevel")
    edit_config(directory, bos_token="absent", eos_token="absent", pad_token="absent")
    special = {
        "bos_token": {"content": "<|bos|>", "lstrip": False, "rstrip": False, "normalized": False},
        "eos_token": "<|end|>",
        "additional_special_tokens": ["capital"],
    }
    (directory / "special_tokens_map.json").write_text(json.dumps(special))


def variant_saved_again(directory: Path) -> None:
    make_tokenizer(directory, "metaspace")
    AutoTokenizer.from_pretrained(directory).save_pretrained(directory)


def variant_metaspace_decoder(directory: Path) -> None:
    make_tokenizer(directory, "metaspace")

    def change(backend: Backend) -> None:
        backend.decoder = decoders.Metaspace(prepend_scheme="first")

    edit_backend(directory, change)
    edit_config(directory, tokenizer_class="PreTrainedTokenizerFast")


def variant_words(directory: Path) -> None:
    """No decoder: tokens are words, joined by spaces."""
    backend = Backend(models.WordLevel({"?": 0, "a": 1, "b": 2, "c": 3}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    write_config(
        directory,
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<e>", "unk_token": "?"},
    )


VARIANTS = {
    name.removeprefix("variant_"): value
    for name, value in list(globals().items())
    if name.startswith("variant_")
}
