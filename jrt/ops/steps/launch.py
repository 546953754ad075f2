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


@dataclass(frozen=True)
class Tiles:
    """Sizes of a product's tiles: BM rows, BN outputs, BK inputs; ROWS is 1 or "more"."""

    rows: int
    BM: int
    BN: int
    BK: int
    stages: int
    warps: int


@functools.cache
def tiles(rows: int, outputs: int, inputs: int, halves: int, itemsize: int) -> Tiles:
    """Tiles for `rows` x `inputs` times a matrix with `outputs` rows (of each half, where there are two)."""
    if rows == 1:
        BK = triton.next_power_of_2(inputs)
        most = max(1, ELEMENTS // (BK * halves))
        BN = min(most, _power_below(outputs // PROGRAMS))
        return Tiles(1, 1, BN, BK, 1, 4)
    BM = min(64, max(16, triton.next_power_of_2(rows)))
    BN = 16 if itemsize < 4 and outputs // 32 * -(-rows // BM) < PROGRAMS else 32
    BK = min(32 if itemsize == 4 else 128, max(16, triton.next_power_of_2(inputs)))
    return Tiles(2, BM, BN, BK, 2 if itemsize == 4 else 4 if BM == 16 else 3, 4)


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
    """Waits until the kernel before this one has ended; only what no kernel of the step writes may be read before."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release_next(PDL: tl.constexpr):
    """Lets the next kernel start, fetch its weights and wait; called as soon as this one has asked for its own weights."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
