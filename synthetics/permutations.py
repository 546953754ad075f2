"""Draws distinct random numbers for many rows at once, the same on every device.

Each row has its own pseudo-random permutation: a Feistel network with random round keys (Black and Rogaway, "Ciphers
with arbitrary finite domains", 2002). Only the values that are asked for are computed, never the whole permutation.
With few numbers to choose from a Feistel network is not uniform enough; then a row of random numbers is sorted instead.
Round keys are drawn on the CPU and the network uses integers only, so the result does not depend on the device.

Shapes: N rows, K numbers a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SMALL = 128  # with fewer numbers to choose from, rows are sorted
ROUNDS = 8  # of the Feistel network
LARGEST = 1 << 24  # most numbers to choose from
ELEMENTS = 1 << 17  # numbers computed at a time on a CPU, so that they stay in its cache


@dataclass(frozen=True)
class Mix:
    """Constants of a hash in integers that wrap around.

    16-bit integers are twice as fast on a CPU as 32-bit ones, so they are used where they suffice."""

    dtype: torch.dtype
    bits: int
    factors: tuple[int, int]  # odd

    @classmethod
    def of(cls, choices: int) -> Mix:
        """Returns the smallest integers that suffice for permuting so many numbers."""
        return SHORT if choices <= 1 << (SHORT.bits - 2) else LONG


SHORT = Mix(torch.int16, 16, (0x6D35, 0x2D39))
LONG = Mix(torch.int32, 32, (0x2C1B3C6D, 0x297A2D39))


def draw_distinct(
    rows: int, count: int, low: int, high: int, random: torch.Generator, device: torch.device | str = "cpu"
) -> Tensor:
    """Draws distinct numbers from low to high - 1, in random order and independently for each row.

    Args:
        rows, count: N, K.
        low, high: the numbers come from low to high - 1; K is at most high - low.
        random: a CPU generator.
        device: where the numbers are computed.

    Returns:
        (N, K) int64.

    Raises:
        ValueError: fewer numbers than K, or more than LARGEST.
    """
    choices = high - low
    if not count <= choices <= LARGEST:
        raise ValueError(
            f"{count} distinct numbers of {choices}: expected at most {choices}, which is at most {LARGEST}"
        )
    if choices < SMALL:
        order = torch.rand(rows, choices, generator=random, dtype=torch.float64).argsort(dim=1)
        return (order[:, :count] + low).to(device)
    mix = Mix.of(choices)
    limit = 1 << (mix.bits - 1)
    keys = torch.randint(-limit, limit, (ROUNDS, rows, 1), generator=random, dtype=mix.dtype).to(device)
    drawn = torch.empty(rows, count, dtype=torch.int64, device=device)
    step = max(1, ELEMENTS // count) if drawn.device.type == "cpu" else max(1, rows)
    places = torch.arange(count, dtype=mix.dtype, device=device)
    for start in range(0, rows, step):
        part = keys[:, start : start + step]
        numbers = _permuted(places.repeat(part.shape[1], 1), part, choices)  # (n, K)
        outside = (numbers >= choices).nonzero(as_tuple=True)
        while len(outside[0]):  # the network permutes 2^bits numbers: walk on until the number is one of ours
            again = _permuted(numbers[outside], part[:, outside[0], 0], choices)
            numbers[outside] = again
            left = again >= choices
            outside = outside[0][left], outside[1][left]
        drawn[start : start + step] = numbers.add_(low) if high <= limit else numbers.long() + low
    return drawn


def _permuted(numbers: Tensor, keys: Tensor, choices: int) -> Tensor:
    """Applies the Feistel network once. It permutes 2^bits numbers, where 2^bits is at least `choices`.

    numbers (...) are overwritten; keys (ROUNDS, ...).
    """
    bits = (choices - 1).bit_length()
    low_bits = bits // 2
    low = numbers & ((1 << low_bits) - 1)
    high = numbers.bitwise_right_shift_(low_bits)
    mix, mixed = Mix.of(choices), torch.empty_like(low)
    for turn in range(0, ROUNDS, 2):
        high.bitwise_xor_(_mixed(low, keys[turn], mix, mixed).bitwise_and_((1 << (bits - low_bits)) - 1))
        low.bitwise_xor_(_mixed(high, keys[turn + 1], mix, mixed).bitwise_and_((1 << low_bits) - 1))
    return high.bitwise_left_shift_(low_bits).bitwise_or_(low)


def _mixed(half: Tensor, key: Tensor, mix: Mix, out: Tensor) -> Tensor:
    """A hash of `half` and `key`, written to `out`. It depends on all bits of both."""
    torch.mul(half, mix.factors[0], out=out)
    out.add_(key).bitwise_xor_(out >> (mix.bits // 2 - 1)).mul_(mix.factors[1])
    return out.bitwise_right_shift_(mix.bits // 2)
