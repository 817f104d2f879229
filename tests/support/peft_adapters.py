"""Real PEFT adapters on tiny models, and PEFT's own answers: the oracle for every number that LoRA produces."""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LINEAR = (*ATTENTION, *MLP)
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def make_adapter(
    model_dir: Path,
    out_dir: Path,
    *,
    r: int = 8,
    alpha: float = 16,
    targets: Sequence[str] | str = ("q_proj", "v_proj"),
    use_rslora: bool = False,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    exclude_modules: list[str] | str | None = None,
    layers_to_transform: list[int] | int | None = None,
    layers_pattern: str | None = None,
    fan_in_fan_out: bool = False,
    lora_dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    strength: float = 0.4,
    seed: int = 0,
) -> Path:
    """Write an adapter whose delta is about ``strength`` times as large as a layer's output; returns ``out_dir``.

    Files are those of ``PeftModel.save_pretrained``, so an adapter of ``embed_tokens`` carries PEFT's copy of the base
    table.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  (PEFT takes floats)
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=use_rslora,
        rank_pattern=rank_pattern or {},
        alpha_pattern=alpha_pattern or {},
        exclude_modules=exclude_modules,
        layers_to_transform=layers_to_transform,
        layers_pattern=layers_pattern,
        fan_in_fan_out=fan_in_fan_out,
        lora_dropout=lora_dropout,
    )
    with _quiet():
        model = get_peft_model(_base(model_dir), config)
        _draw_weights(model, strength, seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
        model.save_pretrained(str(out_dir))
    return out_dir


def edit_config(adapter_dir: Path, **fields: object) -> None:
    """Change fields of an adapter's configuration in place; ``...`` removes one."""
    path = adapter_dir / CONFIG
    config = json.loads(path.read_text())
    for name, value in fields.items():
        if value is ...:
            config.pop(name, None)
        else:
            config[name] = value
    path.write_text(json.dumps(config))


def edit_weights(adapter_dir: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change an adapter's tensors in place: ``edit`` gets them as a dict by name."""
    tensors = load_file(adapter_dir / WEIGHTS)
    edit(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, adapter_dir / WEIGHTS
    )


@torch.no_grad()
def peft_logits(
    model_dir: Path, adapter_dir: Path | None, input_ids: Sequence[int]
) -> torch.Tensor:
    """Logits [T, V] of one sequence, float32, from PEFT (the plain base model without an adapter).

    Loaded models are kept by path, so an adapter must not be edited after its first answer.
    """
    model = _oracle(str(model_dir), str(adapter_dir) if adapter_dir else None)
    return model(torch.tensor([list(input_ids)])).logits[0].float()


@torch.no_grad()
def peft_states(
    model_dir: Path, adapter_dir: Path | None, input_ids: Sequence[int]
) -> torch.Tensor:
    """Hidden states behind the final norm [T, D] of one sequence, float32, from PEFT."""
    model = _oracle(str(model_dir), str(adapter_dir) if adapter_dir else None)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return base.model(torch.tensor([list(input_ids)])).last_hidden_state[0].float()


def peft_generate(
    model_dir: Path,
    adapter_dir: Path | None,
    input_ids: Sequence[int],
    *,
    max_new_tokens: int = 8,
    eos_token_ids: Sequence[int] = (),
) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities, recomputed from the start for each token.

    An end token, if any is given, ends the answer and is part of it.
    """
    tokens, logprobs = list(input_ids), []
    for _ in range(max_new_tokens):
        row = peft_logits(model_dir, adapter_dir, tokens)[-1].log_softmax(-1)
        token = int(row.argmax())
        tokens.append(token)
        logprobs.append(float(row[token]))
        if token in eos_token_ids:
            break
    return tokens[len(input_ids) :], logprobs


def peft_model(model_dir: Path, adapter_dir: Path) -> PeftModel:
    """The base model with the adapter, loaded by PEFT, in eval mode."""
    model = _oracle(str(model_dir), str(adapter_dir))
    assert isinstance(model, PeftModel)
    return model


@functools.lru_cache(maxsize=32)
def _oracle(model_dir: str, adapter_dir: str | None) -> torch.nn.Module:
    model = _base(Path(model_dir))
    if adapter_dir is not None:
        with _quiet():
            model = PeftModel.from_pretrained(model, adapter_dir)
    return model.eval()


def _base(model_dir: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


@torch.no_grad()
def _draw_weights(model: PeftModel, strength: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        rank, scaling = module.r["default"], module.scaling["default"]
        pair = [parameter for name, parameter in module.named_parameters() if "lora_" in name]
        a, b = pair
        spread = a.shape[1] ** -0.5 if "default" in module.lora_A else 1.0
        size = strength / (abs(scaling) * math.sqrt(rank))
        a.copy_(torch.randn(a.shape, generator=generator) * spread)
        b.copy_(torch.randn(b.shape, generator=generator) * size)


@contextmanager
def _quiet() -> Iterator[None]:
    """PEFT warns about much of what is tested on purpose (tied embeddings, fan_in_fan_out, saved tables)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
