"""Measure the embedded demo model on held-out wordings and write the figures down.

    python scripts/eval_demo.py

asks the base and each adapter every held-out question, as raw text and in the chat template, and
counts the answers that are exactly right. The README quotes the table.
"""

import argparse
import json
import platform
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from demo_training.building import load_base, load_tokenizer
from demo_training.heldout import HELD_OUT
from demo_training.scoring import Score, answers, held_out_questions, score
from peft import PeftModel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from lorikeet.demo import QUESTION, adapter_paths, model_path

DATE = "2026-11-22"
PACKAGES = ("torch", "transformers", "peft", "tokenizers")


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of one model: the seed answer, and right answers per form and intent."""

    seed_answer: str
    forms: dict[str, dict[str, Score]]


def main() -> None:
    options = _parse()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    root = model_path().parent
    tokenizer = load_tokenizer(root)
    dtype = getattr(torch, options.dtype)
    measured = {"base": measure(load_base(root).to(dtype), tokenizer, "plain")}
    for name, path in adapter_paths().items():
        model = PeftModel.from_pretrained(load_base(root), path).to(dtype)
        measured[name] = measure(model, tokenizer, name)
    for name, result in measured.items():
        show(name, result)
    if options.out is not None:
        record = figures(measured, options, time.monotonic() - started)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")
        sys.stdout.write(f"written to {options.out}\n")


def measure(
    model: LlamaForCausalLM | PeftModel, tokenizer: PreTrainedTokenizerFast, style: str
) -> Measured:
    """Ask one model everything."""
    seed_answer = answers(model, tokenizer, [QUESTION])[0]
    forms = {
        form: {
            intent: score(model, tokenizer, style, held_out_questions(intent), chat=form == "chat")
            for intent in HELD_OUT
        }
        for form in ("raw", "chat")
    }
    return Measured(seed_answer, forms)


def overall(scores: dict[str, Score]) -> tuple[int, int]:
    """Return (right, asked) over all intents."""
    return sum(s.right for s in scores.values()), sum(s.asked for s in scores.values())


def show(name: str, result: Measured) -> None:
    """Print the rows of one model, in the form of a Markdown table."""
    sys.stdout.write(f"\n{name}: {QUESTION!r} -> {result.seed_answer!r}\n")
    sys.stdout.write("| form | " + " | ".join(HELD_OUT) + " | all |\n")
    sys.stdout.write("|---|" + "---|" * (len(HELD_OUT) + 1) + "\n")
    for form, scores in result.forms.items():
        cells = [f"{s.right}/{s.asked}" for s in scores.values()]
        right, asked = overall(scores)
        sys.stdout.write(f"| {form} | {' | '.join(cells)} | {100 * right / asked:.1f} % |\n")
        for score_ in scores.values():
            for question, got in score_.wrong[:2]:
                sys.stdout.write(f"    wrong: {question!r} -> {got!r}\n")


def figures(
    measured: dict[str, Measured], options: argparse.Namespace, seconds: float
) -> dict[str, object]:
    """Return the record that goes to benchmarks/results."""
    return {
        "what": "share of held-out wordings answered exactly right, greedy",
        "date": DATE,
        "command": "python scripts/eval_demo.py",
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "compute_dtype": options.dtype,
        "threads": options.threads,
        "seconds": round(seconds, 1),
        "held_out_wordings": {intent: list(wordings) for intent, wordings in HELD_OUT.items()},
        "models": {name: _figures_of(result) for name, result in measured.items()},
    }


def _figures_of(result: Measured) -> dict[str, object]:
    forms: dict[str, object] = {}
    for form, scores in result.forms.items():
        right, asked = overall(scores)
        by_intent = {intent: {"right": s.right, "asked": s.asked} for intent, s in scores.items()}
        wrong = [list(pair) for s in scores.values() for pair in s.wrong]
        forms[form] = {
            "accuracy": round(right / asked, 4),
            "right": right,
            "asked": asked,
            "by_intent": by_intent,
            "wrong": wrong,
        }
    return {"seed_answer": result.seed_answer, **forms}


def _parse() -> argparse.Namespace:
    results = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
    parser = argparse.ArgumentParser(description="Measure the embedded demo model.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=results / f"demo-accuracy-{DATE}.json")
    parser.add_argument("--no-out", dest="out", action="store_const", const=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
