"""Compares the public API with the *goldens*, stored outputs of the released code on tiny checkpoints.

A row is one golden folder and one kind of case. Its error is the largest difference, relative to the largest logit.

    python benchmarks/golden_parity.py --golden FOLDER

`full`: one forward; `masked`: with the release's mask; `steps`: prefill and one-token steps; `gen`: scores of greedy
generation, whose tokens must be equal. All with compat="released"; `full, correct` is the default.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import record
import torch
from safetensors.torch import load_file
from torch import Tensor

import jrt

SHORT_PROMPT = {"default": "none", "default_left_pad": "pad", "naive": "iterate"}
BOUND = 1e-3


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def stepwise(model, tensors: dict[str, Tensor], case: str, first: int) -> float:
    ids = tensors[f"{case}.input_ids"]
    out = model(ids[:, :first], attention_mask=tensors.get(f"{case}.mask"), use_cache=True)
    prefill, steps = out.logits, []
    for column in range(first, ids.shape[1]):
        out = model(ids[:, column : column + 1], past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits)
    found = torch.cat(steps, dim=1)
    return max(error(prefill, tensors[f"{case}.prefill_logits"]), error(found, tensors[f"{case}.step_logits"]))


def generation(model, tensors: dict[str, Tensor], case: str, new: int) -> tuple[float, bool]:
    rule = SHORT_PROMPT[case.split("_", 1)[1]] if model.core.has("P") else None
    out = model.generate(
        tensors[f"{case}.input_ids"],
        max_new_tokens=new,
        do_sample=False,
        short_prompt=rule,
        output_logits=True,
        return_dict_in_generate=True,
    )
    same = torch.equal(out.sequences[:, -new:], tensors[f"{case}.sequences"][:, -new:])
    return error(torch.stack(out.logits, dim=1), tensors[f"{case}.scores"]), same


@torch.no_grad()
def measure(folder: Path) -> list[dict]:
    """Returns a row with the largest error for each kind of case in a golden folder."""
    tensors = load_file(folder / "golden.safetensors")
    cases = json.loads((folder / "manifest.json").read_text())["cases"]
    released, correct = jrt.load(folder, compat="released"), jrt.load(folder)
    worst: dict[str, tuple[float, bool]] = {}

    def note(kind: str, found: float, same: bool = True) -> None:
        before, before_same = worst.get(kind, (0.0, True))
        worst[kind] = max(before, found), before_same and same

    for case, facts in cases.items():
        if case.startswith("full"):
            ids, logits = tensors[f"{case}.input_ids"], tensors[f"{case}.logits"]
            note("full", error(released(ids).logits, logits))
            note("full, correct", error(correct(ids).logits, logits))
        elif case.startswith("masked"):
            mask = tensors[f"{case}.attn_mask"]
            note(
                "masked",
                error(released(tensors[f"{case}.input_ids"], attention_mask=mask).logits, tensors[f"{case}.logits"]),
            )
        elif case.startswith("steps"):
            note("steps", stepwise(released, tensors, case, facts["P"]))
        elif case.startswith("gen"):
            note("gen", *generation(released, tensors, case, facts["max_length"] - facts["P"]))
    return [
        {"method": kind, "shape": {"folder": folder.name}, "error": found, "bound": BOUND, "tokens_equal": same}
        for kind, (found, same) in worst.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--golden", type=Path, required=True, help="the folder that holds the golden folders")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for folder in sorted(path.parent for path in arguments.golden.glob("*/golden.safetensors")):
        rows += measure(folder)
        print(
            folder.name,
            *(f"{row['method']} {row['error']:.1e}" for row in rows if row["shape"]["folder"] == folder.name),
            sep="  ",
        )
    if not rows:
        raise SystemExit(f"{arguments.golden} holds no golden folders (FOLDER/golden.safetensors)")
    print(record.write("golden_parity", rows, arguments.json, "cpu"))
    if any(row["error"] > row["bound"] or not row["tokens_equal"] for row in rows):
        raise SystemExit("a case is out of its bound")


if __name__ == "__main__":
    main()
