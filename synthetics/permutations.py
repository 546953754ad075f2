"""Distinct random numbers for many rows at once, the same on every device.

Each row has a permutation of its own, a Feistel network with random round keys (Black and Rogaway, "Ciphers with
arbitrary finite domains", 2002), and only as many of its values are computed as are asked for. Out of few numbers a
network does not choose evenly, so there a row of random numbers is sorted instead. All random numbers are drawn on the
CPU, and a network is integer arithmetic, so that a GPU draws what a CPU draws.

Shapes: N rows, K numbers a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 128  # numbers to choose from: below, they are sorted
ROUNDS = 8
LARGEST = 1 << 24  # numbers to choose from; products of halves and keys stay within 32 bits
ELEMENTS = 1 << 16  # numbers computed at a time on a CPU, so that they stay in its cache


def draw_distinct(
    rows: int, count: int, low: int, high: int, random: torch.Generator, device: torch.device | str = "cpu"
) -> Tensor:
    """Distinct numbers from low to high - 1 in random order, independent between rows.

    Args:
        rows, count: N, K.
        low, high: K is at most high - low.
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
    keys = torch.randint(-(2**31), 2**31, (rows, ROUNDS), generator=random, dtype=torch.int64)
    keys = keys.to(torch.int32).to(device)
    drawn = torch.empty(rows, count, dtype=torch.int64, device=device)
    step = max(1, ELEMENTS // count) if drawn.device.type == "cpu" else max(1, rows)
    places = torch.arange(count, dtype=torch.int32, device=device)
    for start in range(0, rows, step):
        part = keys[start : start + step]
        numbers = _permuted(places.repeat(len(part), 1), part[:, None], choices)  # (n, K)
        outside = (numbers >= choices).nonzero(as_tuple=True)
        while len(outside[0]):  # the network permutes 2^bits numbers: walk on until the number is one of ours
            again = _permuted(numbers[outside], part[outside[0]], choices)
            numbers[outside] = again
            left = again >= choices
            outside = outside[0][left], outside[1][left]
        drawn[start : start + step] = numbers
    return drawn + low


def _permuted(numbers: Tensor, keys: Tensor, choices: int) -> Tensor:
    """One walk through the network: a permutation of 2^bits >= choices numbers. numbers (...), keys (..., ROUNDS)."""
    bits = (choices - 1).bit_length()
    low_bits = bits // 2
    high, low = numbers >> low_bits, numbers & ((1 << low_bits) - 1)
    for turn in range(0, ROUNDS, 2):
        high.bitwise_xor_(_mixed(low, keys[..., turn]).bitwise_and_((1 << (bits - low_bits)) - 1))
        low.bitwise_xor_(_mixed(high, keys[..., turn + 1]).bitwise_and_((1 << low_bits) - 1))
    return high.bitwise_left_shift_(low_bits).bitwise_or_(low)


def _mixed(half: Tensor, key: Tensor) -> Tensor:
    """A hash of half and key in 32 bits that wrap around; its upper bits depend on all of both."""
    mixed = half * 0x2C1B3C6D
    mixed.add_(key).bitwise_xor_(mixed >> 15).mul_(0x297A2D39)
    return mixed.bitwise_right_shift_(16)
