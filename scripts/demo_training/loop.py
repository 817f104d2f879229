"""The training loop, for the base and for an adapter alike."""

import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from demo_training.corpus import END_ID, PAD_ID, Example

__all__ = ["Schedule", "train"]

_BATCHES_SORTED_TOGETHER = 16
_IGNORED = -100


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast to train. Steps, not seconds, so that a run can be repeated."""

    steps: int
    learning_rate: float
    batch_size: int = 64
    warmup: int = 60
    weight_decay: float = 0.01

    def factor(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a fiftieth of the rate."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    examples: Iterator[Example],
    schedule: Schedule,
    *,
    name: str,
    on_checkpoint: Callable[[int], None] | None = None,
    checkpoint_every: int = 800,
) -> float:
    """Train the parameters of `model` that require a gradient; return the seconds it took.

    `model` is the Llama itself: adapters live inside it. Only replies are learnt, not prompts.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=schedule.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=schedule.weight_decay,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor)
    batches = _batches(examples, tokenizer, schedule.batch_size)
    model.train()
    started, recent = time.monotonic(), 0.0
    for step, (tokens, labels) in enumerate(islice(batches, schedule.steps), start=1):
        loss = _loss(model, tokens, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        recent = loss.item() if step == 1 else 0.95 * recent + 0.05 * loss.item()
        if step % 50 == 0 or step == schedule.steps:
            _show(name, step, schedule.steps, recent, time.monotonic() - started)
        if on_checkpoint is not None and step % checkpoint_every == 0 and step < schedule.steps:
            on_checkpoint(step)
            model.train()
    return time.monotonic() - started


def _show(name: str, step: int, steps: int, loss: float, seconds: float) -> None:
    left = seconds / step * (steps - step)
    sys.stdout.write(
        f"{name:>6}  step {step:>5}/{steps}  loss {loss:.4f}  {seconds:5.0f} s, {left:5.0f} s left\n"
    )
    sys.stdout.flush()


def _loss(model: LlamaForCausalLM, tokens: Tensor, labels: Tensor) -> Tensor:
    """Mean loss over the reply tokens; the logits of prompt tokens are never computed.

    Padding is on the right, where causal attention hides it, so no mask is needed.
    """
    hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    targets = labels[:, 1:]
    learnt = targets != _IGNORED
    return nn.functional.cross_entropy(model.lm_head(hidden[learnt]), targets[learnt])


def _batches(
    examples: Iterator[Example], tokenizer: PreTrainedTokenizerFast, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (tokens, labels), examples of like length together so that little is padding."""
    shuffle = random.Random(0)
    while True:
        drawn = list(islice(examples, size * _BATCHES_SORTED_TOGETHER))
        prompts = tokenizer([example.prompt for example in drawn])["input_ids"]
        replies = tokenizer([example.reply for example in drawn])["input_ids"]
        rows = sorted(zip(prompts, replies, strict=True), key=lambda row: len(row[0]) + len(row[1]))
        groups = [rows[start : start + size] for start in range(0, len(rows), size)]
        shuffle.shuffle(groups)
        for group in groups:
            yield _collate(group)


def _collate(rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    width = max(len(prompt) + len(reply) for prompt, reply in rows) + 1
    tokens = torch.full((len(rows), width), PAD_ID)
    labels = torch.full((len(rows), width), _IGNORED)
    for index, (prompt, reply) in enumerate(rows):
        row = torch.tensor([*prompt, *reply, END_ID])
        tokens[index, : len(row)] = row
        labels[index, len(prompt) : len(row)] = row[len(prompt) :]
    return tokens, labels
