"""Measures how much the logits of correct model classes vary in half precision.

The probe (`jrt doctor`) must allow this much, or it would report correct classes as wrong.

    python benchmarks/doctor_bound.py [--device cuda] [--json FILE] [--layers 4]

A row is one class in one precision, as a tiny model (benchmarks/tiny_models.py) or in the size of a published model
(PUBLISHED), with random weights. Its numbers are shares of the largest logit. `batches`: the spread of one row's logits
between a batch of N copies of it and the row alone, for each N. `rounding`: the same if one of 64 embedding values is
rounded in the other direction. `deviation`: the largest deviation in the probe's checks. `bound`: the largest
deviation that the probe allows. All these classes are right in float32, so a bound below `deviation` is too strict.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import record
import torch
import transformers
from tiny_models import available, tiny_model
from transformers import PreTrainedModel

from jrt.probe import probe
from jrt.probe.trials import SPREADS, Trials

SIZES = (2, 4, 8)
NO_ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}

# Name: configuration class and the fields of a published model, but for its vocabulary, which the bound does not need.
PUBLISHED: dict[str, tuple[str, dict]] = {
    "SmolLM2-135M": (
        "LlamaConfig",
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        | {"num_attention_heads": 9, "num_key_value_heads": 3},
    ),
    "gpt2-124m": ("GPT2Config", {"n_embd": 768, "n_layer": 12, "n_head": 12}),
    "mamba2-130m": (
        "Mamba2Config",
        {"hidden_size": 768, "num_hidden_layers": 24, "num_heads": 24, "head_dim": 64, "n_groups": 1},
    ),
}
_LAYERS = ("num_hidden_layers", "n_layer")


def published_model(name: str, layers: int | None) -> PreTrainedModel:
    """Returns a random model in the size of a published one, with its first `layers` layers or all of them."""
    kind, fields = PUBLISHED[name]
    if layers is not None:
        fields = fields | {key: min(layers, fields[key]) for key in _LAYERS if key in fields}
    torch.manual_seed(0)
    config = getattr(transformers, kind)(vocab_size=5000, initializer_range=0.04, **fields, **NO_ENDS)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def models(layers: int | None) -> Iterator[tuple[str, PreTrainedModel]]:
    """Every model of the result, in float32."""
    for name in PUBLISHED:
        yield name, published_model(name, layers)
    for name in available():
        yield name, tiny_model(name)


def spread_over_batches(trials: Trials) -> dict[str, float]:
    """For each size of a batch: the largest difference between a row's logits in it and alone, as a share of the
    largest logit."""
    truth = trials.read(trials.row[None])[0].float()  # (T, V)
    many = {size: trials.read(trials.row.expand(size, -1)).float() for size in SIZES}
    return {str(size): float((logits - truth).abs().max() / truth.abs().max()) for size, logits in many.items()}


@torch.no_grad()
def measured(name: str, model: PreTrainedModel, dtype: torch.dtype) -> dict:
    """Returns a row of the result. The model's weights become `dtype`."""
    found = probe(model.to(dtype))
    trials = Trials(model, 0)
    trials.truth = trials.read(trials.row[None])[0]
    batches = spread_over_batches(trials)
    deviation = max(check.deviation or 0.0 for check in found.checks)
    bound = found.checks[0].bound
    rounding = trials.spreads()[1]
    return {
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "batches": batches,
        "rounding": rounding,
        "deviation": deviation,
        "bound": bound,
        "blamed by 4 x batches": deviation > SPREADS * max(batches.values()),
        "blamed by 4 x rounding": deviation > SPREADS * rounding,
        "blamed by the probe": any(check.holds is False for check in found.checks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, help="of the published models (default: all of them)")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/doctor_bound.json")
    arguments = parser.parse_args()
    rows: list[dict] = []
    written: Path | None = None
    for name, model in models(arguments.layers):
        model.to(arguments.device)
        if not all(check.holds for check in probe(model).checks):
            continue
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        for dtype in (torch.bfloat16, torch.float16):
            model.float().load_state_dict(weights)
            rows.append(measured(name, model, dtype))
            print(rows[-1], flush=True)
            written = record.write(
                "doctor_bound", rows, arguments.json, arguments.device
            )  # so that a run that is cut off is not lost
    for bound in ("by 4 x batches", "by 4 x rounding", "by the probe"):
        print(f"{sum(row[f'blamed {bound}'] for row in rows)} of {len(rows)} are blamed {bound}")
    print(f"written to {written}")


if __name__ == "__main__":
    main()
