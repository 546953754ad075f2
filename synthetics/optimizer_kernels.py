"""Triton kernels of `synthetics.optimizer`: an AdamW step of all models in two passes.

The first pass computes the norm of each model's gradient, the second updates weights and moments. Weights, moments and
gradients are tables with one row for each model.

Shapes: M models, P parameters of each, N parts of P in the first pass.
"""
# mypy: disable-error-code="assignment"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

PARTS = 64  # N
BLOCK = 1024  # parameters of a program at a time


def step(
    weights: Tensor,
    first: Tensor,
    second: Tensor,
    gradients: Tensor,
    peak: Tensor,
    factor: Tensor,
    steps: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    largest_norm: float,
) -> None:
    """Updates weights and moments in place; they and the gradients are tables (M, P) in fp32.

    Args:
        peak: (M, 1) fp64, the largest learning rate of each model.
        factor: scalar in fp64, of the schedule; the learning rate is peak times factor.
        steps: scalar in fp64, number of steps including this one.
        betas, eps, weight_decay: of AdamW.
        largest_norm: gradients of a larger norm are scaled down to it, for each model separately.
    """
    models, parameters = weights.shape
    squares = weights.new_empty(models, PARTS)
    with torch.cuda.device_of(weights):
        _square_kernel[PARTS, models](gradients, squares, parameters, N=PARTS, L=BLOCK)
        _step_kernel[triton.cdiv(parameters, BLOCK), models](
            weights, first, second, gradients, squares, peak, factor, steps, parameters,
            BETA1=betas[0], BETA2=betas[1], LOG1=math.log(betas[0]), LOG2=math.log(betas[1]),
            EPS=eps, DECAY=weight_decay, LARGEST=largest_norm, N=PARTS, L=BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["P"])
def _square_kernel(gradients, squares, P, N: tl.constexpr, L: tl.constexpr):
    model = tl.program_id(1).to(tl.int64)
    total = tl.zeros((L,), tl.float32)
    for start in range(tl.program_id(0) * L, P, N * L):
        p = start + tl.arange(0, L)
        g = tl.load(gradients + model * P + p, mask=p < P, other=0.0)
        total += g * g
    tl.store(squares + model * N + tl.program_id(0), tl.sum(total, 0))


@triton.jit(do_not_specialize=["P"])
def _step_kernel(
    weights, first, second, gradients, squares, peak, factor, steps, P,
    BETA1: tl.constexpr, BETA2: tl.constexpr, LOG1: tl.constexpr, LOG2: tl.constexpr,
    EPS: tl.constexpr, DECAY: tl.constexpr, LARGEST: tl.constexpr, N: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    model = tl.program_id(1).to(tl.int64)
    norm = tl.sqrt(tl.sum(tl.load(squares + model * N + tl.arange(0, N)), 0))
    clip = tl.minimum(LARGEST / (norm + 1e-6), 1.0)
    # In fp64, as torch.optim does: 1 - 0.999^1 keeps 4 digits in fp32.
    rate, count = tl.load(peak + model) * tl.load(factor), tl.load(steps)
    size = rate / (1.0 - tl.exp(count * LOG1))
    correction = tl.sqrt((1.0 - tl.exp(count * LOG2)).to(tl.float32))
    kept = (1.0 - rate * DECAY).to(tl.float32)
    p = tl.program_id(0) * L + tl.arange(0, L)
    at, inside = model * P + p, p < P
    g = tl.load(gradients + at, mask=inside) * clip
    m = tl.load(first + at, mask=inside)
    m += (g - m) * (1 - BETA1)
    v = tl.load(second + at, mask=inside) * BETA2 + g * g * (1 - BETA2)
    w = tl.load(weights + at, mask=inside) * kept
    tl.store(weights + at, w - m / (tl.sqrt(v) / correction + EPS) * size.to(tl.float32), mask=inside)
    tl.store(first + at, m, mask=inside)
    tl.store(second + at, v, mask=inside)
