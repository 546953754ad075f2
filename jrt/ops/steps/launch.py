"""What the kernels of a step share: tile sizes, and the start of a kernel while the one before it still runs."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

ELEMENTS = 16_384  # weights that one program fetches at once when there is one row
PROGRAMS = 132  # programs that a product should have at least, about one a multiprocessor
LONGEST = 16_384  # inputs of a product that one program can hold
LARGE = 8192  # outputs from which weights have to be read once, for all rows together
MOST_SPLITS = 8  # parts that the sum over a product's inputs is cut into


@dataclass(frozen=True)
class Tiles:
    """Sizes of a product's tiles: BM rows, BN outputs, BK inputs at a time; ROWS is 1 or 2, which means more."""

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
    """Whether kernels may start early there (programmatic dependent launch, Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def early(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel that calls `after_previous`."""
    return {"PDL": True, "launch_pdl": True} if overlaps(device) else {"PDL": False}


@triton.jit
def after_previous(PDL: tl.constexpr):
    """Waits until the kernel before this one has ended.

    Before that a kernel may read weights, and states that it alone writes: those of the last token are complete, because a
    step ends with an ordinary kernel, which nothing overtakes.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release_next(PDL: tl.constexpr):
    """Lets the next kernel start, fetch its weights and wait; called as soon as this one has asked for its own weights."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
