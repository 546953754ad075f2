"""The state that a program keeps in registers: a tuple of tiles of S, and a tuple of tiles of z.

In memory S is (F, D) and z (F,), fp32, with the weights and the order of `taylor_features`. In registers, a state has
no weights, because features of keys have none inside the kernels (see `features`): it is divided by them when it is
read. The gradient with respect to a state (GRADIENT), a sum of features of queries, is multiplied by them instead.

Shapes: C tokens of a chunk, d query/key size (DK padded), D value size (DV columns of a program), R rows of a tile.
"""
# ruff: noqa: RUF005 - Triton's compiler knows no unpacking inside a tuple
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl

from jrt.ops.triton.features import features_transposed, row_places, weighted


@triton.jit
def start_state(
    S, z, which, columns, HAS_START: tl.constexpr, GRADIENT: tl.constexpr, d: tl.constexpr, D: tl.constexpr,
    F: tl.constexpr, DV: tl.constexpr, PAIR_TILES: tl.constexpr, PAIR_ROWS: tl.constexpr, REST_ROWS: tl.constexpr,
):  # fmt: skip
    """Tiles (R, DV) of S and (R,) of z, read from state number `which` in memory; zeros unless HAS_START."""
    tiles = ()
    sums = ()
    for t in tl.static_range(PAIR_TILES + 1):
        if HAS_START:
            place, weight, real = row_places(t, d, PAIR_TILES, PAIR_ROWS, REST_ROWS)
            if not GRADIENT:
                weight = 1.0 / weight
            at = S + which * F * D + place[:, None] * D + columns[None, :]
            tile = tl.load(at, mask=real[:, None] & (columns < D)[None, :], other=0.0) * weight[:, None]
            sum_ = tl.load(z + which * F + place, mask=real, other=0.0) * weight
        else:
            tile = tl.zeros((PAIR_ROWS if t < PAIR_TILES else REST_ROWS, DV), tl.float32)
            sum_ = tl.zeros((PAIR_ROWS if t < PAIR_TILES else REST_ROWS,), tl.float32)
        tiles = tiles + (tile,)
        sums = sums + (sum_,)
    return tiles, sums


@triton.jit
def write_state(
    S, z, tiles, sums, which, columns, with_z, GRADIENT: tl.constexpr, d: tl.constexpr, D: tl.constexpr,
    F: tl.constexpr, PAIR_TILES: tl.constexpr, PAIR_ROWS: tl.constexpr, REST_ROWS: tl.constexpr,
):  # fmt: skip
    """Writes the state to memory: the reverse of `start_state`. with_z: whether this program also writes z."""
    for t in tl.static_range(PAIR_TILES + 1):
        place, weight, real = row_places(t, d, PAIR_TILES, PAIR_ROWS, REST_ROWS)
        if GRADIENT:
            weight = 1.0 / weight
        at = S + which * F * D + place[:, None] * D + columns[None, :]
        tl.store(at, tiles[t] * weight[:, None], mask=real[:, None] & (columns < D)[None, :])
        tl.store(z + which * F + place, sums[t] * weight, mask=real & with_z)


@triton.jit
def fades(rate, length, C: tl.constexpr):
    """Factors of decay: from the state before a chunk to each query (C,), from each key to the state after the chunk
    (C,), and over the whole chunk. length: tokens of the chunk, which may be fewer than C."""
    step = tl.arange(0, C)
    to_query = tl.exp(rate * (step + 1))
    to_end = tl.exp(rate * tl.maximum(length - 1 - step, 0))
    return to_query, to_end, tl.exp(rate * length)


@triton.jit
def add_chunk(
    tiles, sums, xT, u, by_value, by_one, whole, zero, GRADIENT: tl.constexpr, SCALED: tl.constexpr,
    HAS_DECAY: tl.constexpr, d: tl.constexpr, DK: tl.constexpr, PAIR_TILES: tl.constexpr, PAIR_ROWS: tl.constexpr,
    REST_ROWS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state after a chunk: phi(x) u^T is added to S, and phi(x) to z. xT: x transposed, (DK, C); u: (C, DV).

    x are keys, or queries if GRADIENT. Tokens are weighted by `by_one` (C,) in z and, if SCALED, by `by_value` (C,) in
    S. With decay, the old S is first multiplied by `whole`.
    """
    new_tiles = ()
    new_sums = ()
    for t in tl.static_range(PAIR_TILES + 1):
        phi = features_transposed(xT, t, zero, d, DK, PAIR_TILES, PAIR_ROWS, REST_ROWS, PRECISION)  # (R, C)
        if GRADIENT:
            phi = weighted(phi, tl.arange(0, phi.shape[0])[:, None], t, d, PAIR_TILES, PAIR_ROWS)
        new_sums = new_sums + (sums[t] + tl.sum(phi * by_one[None, :], 1),)
        tile = tiles[t]
        if HAS_DECAY:
            tile = tile * whole
        if SCALED:
            phi = phi * by_value[None, :]
        new_tiles = new_tiles + (tl.dot(phi.to(WIDE), u, tile, input_precision=PRECISION),)
    return new_tiles, new_sums
