"""Runs a serving benchmark of another project as its wheel has it: ``python bench_client.py sglang|vllm DIRECTORY OPTIONS...``.

The benchmark is unmodified. What its package would import besides, a whole inference engine for the most part, is
replaced by modules with the few names that the client's files ask for at import; DIRECTORY holds the unpacked wheel.
"""

from __future__ import annotations

import argparse
import logging
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any


def put(name: str, **members: object) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module
    return module


@dataclass
class SampleRequest:
    """One prompt, with the fields that vLLM's client reads."""

    prompt: str
    prompt_len: int
    expected_output_len: int
    request_id: str
    multi_modal_data: None = None
    chat_messages: None = None
    request_overrides: None = None
    timestamp: None = None


def add_dataset_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-prompts", type=int)
    parser.add_argument("--seed", type=int, default=0)
    names = ("dataset_path", "input_len", "output_len", "self_timed")
    parser.set_defaults(**dict.fromkeys(names), dataset_name="questions", trust_remote_code=False)


def get_samples(args: argparse.Namespace, tokenizer: Any) -> list[SampleRequest]:
    texts = [f"Question {number}: where is Oslo?" for number in range(args.num_prompts)]
    return [
        SampleRequest(text, len(tokenizer(text).input_ids), 6, request_id=f"r{number}")
        for number, text in enumerate(texts)
    ]


def get_tokenizer(name: str, **_: object) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def run_sglang(root: Path) -> None:
    put("sglang").__path__ = [str(root / "sglang")]
    put("sglang.srt.disaggregation.utils", FAKE_BOOTSTRAP_HOST="2.2.2.2")
    put("datasets", load_dataset=None)
    runpy.run_module("sglang.benchmark.serving", run_name="__main__")


def run_vllm(root: Path) -> None:
    put("vllm").__path__ = [str(root / "vllm")]
    put(
        "vllm.benchmarks.datasets",
        SampleRequest=SampleRequest,
        add_dataset_parser=add_dataset_parser,
        get_samples=get_samples,
    )
    put("vllm.tokenizers", TokenizerLike=object, get_tokenizer=get_tokenizer)
    put("vllm.logger", init_logger=logging.getLogger)
    put("vllm.utils.argparse_utils", FlexibleArgumentParser=argparse.ArgumentParser)
    put("vllm.utils.gc_utils", freeze_gc_heap=lambda: None)
    put("vllm.utils.network_utils", join_host_port=None)
    from vllm.benchmarks import serve  # pyright: ignore[reportMissingImports]

    parser = argparse.ArgumentParser(conflict_handler="resolve")
    serve.add_cli_args(parser)
    serve.main(parser.parse_args())


if __name__ == "__main__":
    kind, directory = sys.argv[1:3]
    del sys.argv[1:3]
    # In place of this script's own, where a module is called like a library.
    sys.path[0] = directory
    {"sglang": run_sglang, "vllm": run_vllm}[kind](Path(directory))
