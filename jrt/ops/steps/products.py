"""Products of a few rows with a weight matrix, together with the norm before and the activation after them.

Shapes: B batch rows, W width, K inputs, N outputs, E channels, T taps of a convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from jrt.ops.steps.launch import Tiles, early, tiles
from jrt.ops.steps.product_kernels import gated_kernel, partial_kernel, project_kernel, residual_kernel
from jrt.ops.steps.stream import Left, Norm, Stream, add_and_norm


class Taps(NamedTuple):
    """A causal convolution over the last T inputs of each channel."""

    weight: Tensor  # (E, T), the newest input's last
    bias: Tensor | None  # (E,)
    state: Tensor  # (B, T - 1, E), updated in place


def project(stream: Stream, norm: Norm, weights: Sequence[Tensor], bias: Tensor | None, out: Tensor) -> None:
    """out (B, N) = norm(x) times up to four weights (N_i, W), concatenated; N is the sum of the N_i.

    bias: (N,), with a single weight only. All products here take the residual stream x (B, W) from `stream`."""
    x, inner = _normed(stream, norm)
    _launch_project(x, stream, inner, weights, bias, out)


def product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out (B, N) = x (B, K) times weight (N, K)."""
    _launch_project(x, None, None, [weight], None, out)


def _normed(stream: Stream, norm: Norm) -> tuple[Tensor, Norm | None]:
    """The input of a product, and the norm that its kernel still has to apply to it (None: it is normed already)."""
    if stream.x.shape[0] == 1:
        return stream.x, norm  # with more rows, a norm in every program costs more than a kernel for the norm
    return add_and_norm(stream, norm), None


def _launch_project(
    x: Tensor, stream: Stream | None, norm: Norm | None, weights: Sequence[Tensor], bias: Tensor | None, out: Tensor
) -> None:
    batch, inputs = x.shape
    counts = [weight.shape[0] for weight in weights] + [0] * (4 - len(weights))
    sizes = tiles(batch, sum(counts), inputs, weights[0].element_size())
    grid = (triton.cdiv(batch, sizes.BM), sum(triton.cdiv(count, sizes.BN) for count in counts))
    pointers = [*weights, *[weights[0]] * (4 - len(weights))]
    project_kernel[grid](
        x, x if norm is None else norm.weight, x if stream is None else stream.squares, *pointers,
        x if bias is None else bias, out, batch, inputs, *counts,
        0 if norm is None else norm.left.parts, 0.0 if norm is None else norm.eps,
        NORM=norm is not None, BIAS=bias is not None, PP=_lanes(norm), **_options(sizes, x.device),
    )  # fmt: skip


def swiglu(stream: Stream, norm: Norm, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out (B, E) = a silu(b), a and b the two halves of norm(x) times weight (2 E, W)."""
    _launch_gated(0, stream, norm, weight, bias, None, out, None)


def convolution(stream: Stream, norm: Norm, weight: Tensor, bias: Tensor | None, taps: Taps, out: Tensor) -> None:
    """out (B, E) = silu(convolution(a)) b, a and b the two halves of norm(x) times weight (2 E, W)."""
    _launch_gated(1, stream, norm, weight, bias, taps, out, None)


def mamba_inputs(stream: Stream, norm: Norm, weight: Tensor, taps: Taps, out: Tensor, gate: Tensor) -> None:
    """out = silu(convolution(a)) and gate = silu(b), (B, E) each, of the halves a and b of norm(x) times weight (2 E,
    W)."""
    _launch_gated(2, stream, norm, weight, None, taps, out, gate)


def _launch_gated(
    mode: int, stream: Stream, norm: Norm, weight: Tensor, bias: Tensor | None, taps: Taps | None, out: Tensor,
    gate: Tensor | None,
) -> None:  # fmt: skip
    batch, channels = out.shape
    sizes = tiles(batch, channels, weight.shape[1], weight.element_size(), halves=2)
    grid = (triton.cdiv(batch, sizes.BM), triton.cdiv(channels, sizes.BN))
    tap_bias = None if taps is None else taps.bias
    x, inner = _normed(stream, norm)
    gated_kernel[grid](
        x, norm.weight, stream.squares, weight, weight if bias is None else bias, out,
        out if gate is None else gate, out if taps is None else taps.state, weight if taps is None else taps.weight,
        weight if tap_bias is None else tap_bias, batch, weight.shape[1], channels, norm.left.parts, norm.eps,
        MODE=mode, T=1 if taps is None else taps.weight.shape[1], NORM=inner is not None, BIAS=bias is not None,
        TAP_BIAS=tap_bias is not None, PP=_lanes(inner), **_options(sizes, out.device),
    )  # fmt: skip


def add_product(h: Tensor, weight: Tensor, bias: Tensor | None, stream: Stream) -> None:
    """Adds h (B, K) times weight (W, K), plus bias, to the residual stream, rounded to the dtype of the weights.

    With more than one row only the product is computed here; `add_and_norm` adds it later. `added` says what this
    leaves to the next norm.
    """
    batch, width = stream.x.shape
    sizes = _residual_tiles(batch, weight)
    blocks = triton.cdiv(width, sizes.BN)
    if batch == 1:
        residual_kernel[(1, blocks)](
            h, weight, weight if bias is None else bias, stream.x, stream.squares, weight.shape[1], width,
            BIAS=bias is not None, **_options(sizes, h.device),
        )  # fmt: skip
        return
    partial_kernel[(triton.cdiv(batch, sizes.BM), blocks, sizes.splits)](
        h, weight, stream.partial, batch, weight.shape[1], width, S=sizes.splits, **_options(sizes, h.device)
    )


def added(weight: Tensor, bias: Tensor | None, rows: int) -> Left:
    """What `add_product` with this weight (W, K) leaves to the next norm of a stream of `rows` rows."""
    sizes = _residual_tiles(rows, weight)
    if rows == 1:
        return Left(triton.cdiv(weight.shape[0], sizes.BN))
    return Left(0, sizes.splits, bias)


def _residual_tiles(rows: int, weight: Tensor) -> Tiles:
    return tiles(rows, *weight.shape, weight.element_size(), may_split=True)


def _lanes(norm: Norm | None) -> int:
    return 1 if norm is None else triton.next_power_of_2(norm.left.parts)


def _options(sizes: Tiles, device: torch.device) -> dict[str, int | bool]:
    return {
        "ROWS": sizes.rows, "BM": sizes.BM, "BN": sizes.BN, "BK": sizes.BK, "STAGES": sizes.stages,
        "num_warps": sizes.warps, **early(device),
    }  # fmt: skip
