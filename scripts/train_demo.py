"""Train the embedded demo model and its adapters from the table of facts.

    python scripts/train_demo.py --out src/lorikeet/demo

retrains everything on two cores, without a network. Seeds and step counts are fixed; on the same
machine and torch build the same weights come out.
"""

import argparse
import random
import shutil
import sys
import time
from pathlib import Path
from typing import cast

import torch
from demo_training.building import (
    ADAPTERS,
    build_base,
    build_tokenizer,
    load_base,
    load_tokenizer,
    lora_config,
    save_adapter,
    save_base,
)
from demo_training.corpus import base_examples, style_examples
from demo_training.heldout import TUNING, leaked
from demo_training.loop import Schedule, train
from demo_training.scoring import answers, held_out_questions, score
from peft import PeftModel, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from lorikeet.demo import QUESTION

SEED = 20261122

BASE = Schedule(steps=2400, learning_rate=2e-3, warmup=100)
ADAPTER = {
    "lines": Schedule(steps=400, learning_rate=4e-3, weight_decay=0.0),
    "json": Schedule(steps=400, learning_rate=2e-3, weight_decay=0.0),
    "sql": Schedule(steps=400, learning_rate=1e-3, weight_decay=0.0),
    "pirate": Schedule(steps=400, learning_rate=4e-3, weight_decay=0.0),
}


def main() -> None:
    options = _parse()
    if leaks := leaked():
        sys.exit(f"held-out wordings that training can make: {leaks}")
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    seconds = {}
    if not options.adapters_only:
        seconds["base"] = train_base(options.out, options.scale)
    for name in options.adapters:
        seconds[name] = train_adapter(options.out, name, options.scale)
    say(f"training seconds: { {name: round(value) for name, value in seconds.items()} }")
    say(f"everything took {time.monotonic() - started:.0f} s")


def train_base(root: Path, scale: float) -> float:
    """Train tokenizer and base into `root`/base; return the seconds of training."""
    torch.manual_seed(SEED)
    tokenizer = build_tokenizer(SEED)
    model = build_base()
    say(f"base: {sum(p.numel() for p in model.parameters()):,} parameters")
    took = train(
        model,
        tokenizer,
        base_examples(random.Random(SEED)),
        scaled(BASE, scale),
        name="base",
        on_checkpoint=lambda _: report(model, tokenizer, "plain"),
    )
    shutil.rmtree(root / "base", ignore_errors=True)
    save_base(model, tokenizer, root / "base")
    report(load_base(root), load_tokenizer(root), "plain")
    return took


def train_adapter(root: Path, name: str, scale: float) -> float:
    """Train one adapter on the base as shipped into `root`/adapters; return the seconds."""
    torch.manual_seed(SEED)
    tokenizer = load_tokenizer(root)
    model = get_peft_model(load_base(root), lora_config(ADAPTERS[name]))
    took = train(
        cast("LlamaForCausalLM", model.get_base_model()),
        tokenizer,
        style_examples(random.Random(f"{SEED} {name}"), name),
        scaled(ADAPTER[name], scale),
        name=name,
    )
    directory = root / "adapters" / name
    shutil.rmtree(directory, ignore_errors=True)
    save_adapter(model, directory)
    report(model, tokenizer, name)
    return took


def report(
    model: LlamaForCausalLM | PeftModel, tokenizer: PreTrainedTokenizerFast, style: str
) -> None:
    """Show the answer to the seed question and the accuracy on a part of the tuning set."""
    say(f"  {QUESTION!r} -> {answers(model, tokenizer, [QUESTION])[0]!r}")
    for intent in TUNING:
        # A prime stride visits every wording and, over all of them, every country.
        result = score(model, tokenizer, style, held_out_questions(intent, TUNING)[::5])
        missed = f"  e.g. {result.wrong[0]}" if result.wrong else ""
        say(f"  {intent:>10}: {result.right}/{result.asked}{missed}")


def scaled(schedule: Schedule, scale: float) -> Schedule:
    """Shorten a schedule for a trial run."""
    return Schedule(
        steps=max(1, round(schedule.steps * scale)),
        learning_rate=schedule.learning_rate,
        batch_size=schedule.batch_size,
        warmup=max(1, round(schedule.warmup * scale)),
        weight_decay=schedule.weight_decay,
    )


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the embedded demo model.")
    parser.add_argument("--out", type=Path, required=True, help="directory for base/ and adapters/")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--adapters-only", action="store_true", help="keep the base in --out")
    parser.add_argument("--adapters", nargs="*", choices=list(ADAPTERS), default=list(ADAPTERS))
    parser.add_argument("--quick", action="store_true", help="a twentieth of the steps: a trial")
    options = parser.parse_args()
    options.scale = 0.05 if options.quick else 1.0
    return options


if __name__ == "__main__":
    main()
