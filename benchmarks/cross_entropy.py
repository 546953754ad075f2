"""Measures the output head with its cross-entropy, forward and backward, in several implementations.

    python benchmarks/cross_entropy.py [--output FILE]

The sizes are those of training JRT-360M: a head of bf16 weights, all places of a batch, a label at each. The loss and
both gradients are first compared with fp64 on a part of the places; an implementation whose error is more than twice
that of all logits in bf16 gets a row with the reason. The times are of the launched calls, without a CUDA graph,
because some of them wait for the device. "here" is what training calls: Liger on larger parts.

Shapes: N places, E width, V vocabulary rows.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

import record
import torch
import torch.nn.functional as F
from op_training import FAILURES, median_ms
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from jrt.config import presets
from jrt.training.loss import summed_cross_entropy

CONFIG = presets()["jrt-360m"]
N, E, V = 16 * 2048, CONFIG.width, CONFIG.vocab_rows
CHUNK, COMPARED = 2048, 512  # places: of a chunk, and those that are compared with fp64
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden (N, E), head (V, E), labels (N,): the sum


def all_logits(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, head).float(), labels, reduction="sum")


def exact(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, head), labels, reduction="sum")


def chunks(one: Loss) -> Loss:
    """The logits of a chunk of places at a time; the backward pass computes them again."""

    def loss(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        parts = zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)
        return torch.stack([checkpoint(one, x, head, own, use_reentrant=False) for x, own in parts]).sum()

    return loss


def liger(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
    return loss(head, hidden, labels)


def cut(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy

    return cut_cross_entropy(hidden, head, labels, reduction="sum")


def implementations() -> dict[str, Loss | str]:
    """By name; a string says why it cannot be measured."""
    one = torch.compile(all_logits, dynamic=False)
    found: dict[str, Loss | str] = {
        "all logits": all_logits,
        "all logits, compiled": one,
        "chunks, compiled": chunks(one),
    }
    for name, package, loss in (("Liger", "liger_kernel", liger), ("cut-cross-entropy", "cut_cross_entropy", cut)):
        found[name] = loss if importlib.util.find_spec(package) else f"{package} is not installed"
    return found | {"here": summed_cross_entropy}


def with_gradients(loss: Loss, hidden: Tensor, head: Tensor, labels: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (hidden, head)]
    total = loss(*leaves, labels)
    return [total.detach(), *torch.autograd.grad(total, leaves)]


def errors(loss: Loss, hidden: Tensor, head: Tensor, labels: Tensor, truth: list[Tensor]) -> list[float]:
    """Relative errors of the loss and of both gradients."""
    pairs = zip(with_gradients(loss, hidden, head, labels), truth, strict=True)
    return [float((found.double() - right).norm() / right.norm()) for found, right in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    torch.manual_seed(0)
    hidden = torch.randn(N, E, device="cuda").bfloat16()
    head = (torch.randn(V, E, device="cuda") / E**0.5).bfloat16()
    labels = torch.randint(V, (N,), device="cuda")
    few = hidden[:COMPARED], head, labels[:COMPARED]
    truth = with_gradients(exact, few[0].double(), head.double(), few[2])
    allowed = [2 * error + 1e-6 for error in errors(all_logits, *few, truth)]
    rows: list[dict] = []
    for name, loss in implementations().items():
        row: dict = {"method": name, "shape": {"N": N, "E": E, "V": V}, "ms": None, "extra_bytes": None}
        rows.append(row)
        if isinstance(loss, str):
            row["reason"] = loss
        else:
            try:
                row["errors"] = errors(loss, *few, truth)
                if any(error > most for error, most in zip(row["errors"], allowed, strict=True)):
                    row["reason"] = f"errors {row['errors']}: at most {allowed} count as right"
                measure(row, loss, hidden, head, labels)
            except FAILURES as error:
                row["reason"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        record.write("cross_entropy", rows, arguments.output)
        print({key: value for key, value in row.items() if key != "shape"}, flush=True)


def measure(row: dict, loss: Loss, hidden: Tensor, head: Tensor, labels: Tensor) -> None:
    """Fills in the time, and the memory beyond the inputs and the gradients."""
    with_gradients(loss, hidden, head, labels)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = sum(x.nbytes for x in with_gradients(loss, hidden, head, labels))
    row["extra_bytes"] = torch.cuda.max_memory_allocated() - before - kept
    row["ms"] = median_ms(lambda: with_gradients(loss, hidden, head, labels), 10)


if __name__ == "__main__":
    main()
