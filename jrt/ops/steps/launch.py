"""Shared by the kernels of a step: tile sizes, and the early start of a kernel while the one before it still runs."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

ELEMENTS = 16_384  # most weights that one program loads at once, with one row
PROGRAMS = 132  # a product should have at least so many programs, about one for each multiprocessor
LONGEST = 16_384  # most inputs of a product that one program can hold
# With so many outputs and more than 64 rows, a product's tiles have more rows, so that weights are read less often.
LARGE = 8192
MOST_SPLITS = 8  # most parts into which the sum over a product's inputs is cut


@dataclass(frozen=True)
class Tiles:
    """Sizes of a product's tiles: BM rows, BN outputs, BK inputs at a time. rows: 1 for one row, 2 for several."""

    rows: int
    BM: int
    BN: int
    BK: int
    stages: int
    warps: int
    splits: int = 1  # programs that share the inputs of one tile


@functools.cache
def tiles(rows: int, outputs: int, inputs: int, itemsize: int, halves: int = 1, may_split: bool = False) -> Tiles:
    """Tiles for `rows` x `inputs` times a matrix with `outputs` rows (of each half, where there are two)."""
    if rows == 1:
        BK = triton.next_power_of_2(inputs)
        most = max(1, ELEMENTS // (BK * halves))
        BN = min(most, _power_below(outputs // PROGRAMS))
        return Tiles(1, 1, BN, BK, 1, 4)
    BM = min(64, max(16, triton.next_power_of_2(rows)))
    if itemsize == 4:
        BN, BK, stages = 32, 32, 2
    elif may_split and BM == 64:
        BN, BK, stages = 64, 64, 6
    elif rows > 64 and outputs >= LARGE:
        BM, BN, BK, stages = 128, 64, 64, 4
    elif BM == 16:
        BN, BK, stages = 32, 128, 4
    else:
        BN, BK, stages = 32, 64, 6
    BK = min(BK, max(16, triton.next_power_of_2(inputs)))
    splits = 1
    if may_split:
        tiles_of_all = -(-outputs // BN) * -(-rows // BM)
        splits = max(1, min(MOST_SPLITS, PROGRAMS // tiles_of_all, inputs // BK))
    return Tiles(2, BM, BN, BK, stages, 4, splits)


def _power_below(number: int) -> int:
    return 1 << max(0, number.bit_length() - 1)


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether kernels on this device can start early (programmatic dependent launch, PDL: Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def early(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel that calls `after_previous`."""
    return {"PDL": True, "launch_pdl": True} if overlaps(device) else {"PDL": False}


@triton.jit
def after_previous(PDL: tl.constexpr):
    """Waits until the kernel before this one has ended.

    Before this call, a kernel may read weights, and states that no other kernel writes. Those states are complete: the
    step before ends with a kernel that does not allow an early start.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release_next(PDL: tl.constexpr):
    """Allows the next kernel to start early, load its weights and wait. Call it once this kernel's own loads are
    issued."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
