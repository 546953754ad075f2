"""The features of the Taylor map inside a kernel, in tiles of rows, and their derivatives.

A state has F = 1 + d + d (d + 1) / 2 rows. They are held in PAIR_TILES tiles of PAIR_ROWS rows, which hold the pairs
i < j and the constant, and one tile of REST_ROWS rows, which holds the first order and the squares. At d = 16 that is
160 rows for 153 features. The pairs are ordered by circular distance, so that i and j need no table. A tile of x_i is a
product of x with a matrix of zeros and ones, exact in any dtype.

Inside the kernels the features of keys are bare products (x_i x_j, x_i, 1) and those of queries carry both sides'
weights: 1 / d for a pair, 1 / (2 d) for a square, 1 / sqrt(d) for the first order. In memory a state has the weights
and the order of `taylor_features`; `row_places` converts.

Shapes: C tokens of a chunk, DK = d padded to a power of two, R rows of a tile.
"""

import triton
import triton.language as tl


@triton.jit
def zero_of(first, x, d: tl.constexpr):
    """Zero; for large d, or for x in fp32, the compiler cannot know this, because it is computed from a token's number.

    The compiler keeps in memory what does not change from chunk to chunk: the matrices of `picker`. If they are small,
    this saves time. But for large d they would fill the shared memory, and in fp32 the registers. Adding this zero to
    their indices makes them look different in each chunk, so that they are computed again.

    first: the number of a chunk's first token, never negative. x: the pointer to queries or keys.
    """
    if d > 16 or x.dtype.element_ty == tl.float32:
        zero = first >> 31
    else:
        zero = 0
    return zero


@triton.jit
def row_pairs(
    t: tl.constexpr, zero, d: tl.constexpr, PAIR_TILES: tl.constexpr, PAIR_ROWS: tl.constexpr,
    REST_ROWS: tl.constexpr,
):  # fmt: skip
    """The indices i and j (R,) of the pairs in tile t, -1 for rows without a pair; zero: the result of `zero_of`."""
    if t < PAIR_TILES:
        r = t * PAIR_ROWS + tl.arange(0, PAIR_ROWS) + zero
        real = r < d * (d - 1) // 2
        j = tl.where(real, (r + 1 + r // d) % d, -1)
    else:
        r = tl.arange(0, REST_ROWS) + zero
        real = r < 2 * d
        j = tl.where(real, r % d, -1)
    return tl.where(real, r % d, -1), j


@triton.jit
def row_places(
    t: tl.constexpr, d: tl.constexpr, PAIR_TILES: tl.constexpr, PAIR_ROWS: tl.constexpr, REST_ROWS: tl.constexpr
):
    """For the rows of tile t, (R,) each: their index in the state in memory, their weight there, and whether they
    exist."""
    pairs: tl.constexpr = d * (d - 1) // 2
    if t < PAIR_TILES:
        r = t * PAIR_ROWS + tl.arange(0, PAIR_ROWS)
        i = r % d
        j = (i + 1 + r // d) % d
        low = tl.minimum(i, j)
        place = tl.where(r < pairs, 1 + d + low * d - low * (low - 1) // 2 + tl.maximum(i, j) - low, 0)
        weight = tl.where(r < pairs, 1.0 / d**0.5, 1.0)
        real = r <= pairs
    else:
        r = tl.arange(0, REST_ROWS)
        i = r % d
        place = tl.where(r < d, 1 + i, 1 + d + i * d - i * (i - 1) // 2)
        weight = tl.where(r < d, 1.0 / d**0.25, 0.7071067811865476 / d**0.5)
        real = r < 2 * d
    return place, weight, real


@triton.jit
def picker(i, DK: tl.constexpr, like):
    """(DK, R) of zeros and ones: x @ picker is x_i for each row."""
    return (tl.arange(0, DK)[:, None] == i[None, :]).to(tl.float32).to(like.dtype)


@triton.jit
def picker_transposed(i, DK: tl.constexpr, like):
    """(R, DK) of zeros and ones."""
    return (i[:, None] == tl.arange(0, DK)[None, :]).to(tl.float32).to(like.dtype)


@triton.jit
def products(a, b, r, t: tl.constexpr, d: tl.constexpr, PAIR_TILES: tl.constexpr, PAIR_ROWS: tl.constexpr):
    """Features without weights of tile t, from its factors; r is the row's number along their axis."""
    if t < PAIR_TILES:
        phi = a * b
        if (t + 1) * PAIR_ROWS > d * (d - 1) // 2:
            phi = tl.where(t * PAIR_ROWS + r == d * (d - 1) // 2, 1.0, phi)
    else:
        phi = tl.where(r < d, a, a * a)
    return phi


@triton.jit
def weighted(phi, r, t: tl.constexpr, d: tl.constexpr, PAIR_TILES: tl.constexpr, PAIR_ROWS: tl.constexpr):
    """Features of queries, from bare products: multiplied by the weights of both sides."""
    if t < PAIR_TILES:
        weights = 1.0 / d
        if (t + 1) * PAIR_ROWS > d * (d - 1) // 2:
            weights = tl.where(t * PAIR_ROWS + r == d * (d - 1) // 2, 1.0, 1.0 / d)
    else:
        weights = tl.where(r < d, 1.0 / d**0.5, 0.5 / d)
    return phi * weights


@triton.jit
def factors(
    x, t: tl.constexpr, zero, d: tl.constexpr, DK: tl.constexpr, PAIR_TILES: tl.constexpr,
    PAIR_ROWS: tl.constexpr, REST_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x_i and x_j (C, R) in fp32, of x (C, DK)."""
    i, j = row_pairs(t, zero, d, PAIR_TILES, PAIR_ROWS, REST_ROWS)
    a = tl.dot(x, picker(i, DK, x), input_precision=PRECISION)
    if t < PAIR_TILES:
        b = tl.dot(x, picker(j, DK, x), input_precision=PRECISION)
    else:
        b = a
    return a, b


@triton.jit
def features(
    x, t: tl.constexpr, zero, d: tl.constexpr, DK: tl.constexpr, PAIR_TILES: tl.constexpr,
    PAIR_ROWS: tl.constexpr, REST_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Bare features (C, R) in fp32, of x (C, DK)."""
    a, b = factors(x, t, zero, d, DK, PAIR_TILES, PAIR_ROWS, REST_ROWS, PRECISION)
    return products(a, b, tl.arange(0, a.shape[1])[None, :], t, d, PAIR_TILES, PAIR_ROWS)


@triton.jit
def features_transposed(
    xT, t: tl.constexpr, zero, d: tl.constexpr, DK: tl.constexpr, PAIR_TILES: tl.constexpr,
    PAIR_ROWS: tl.constexpr, REST_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Bare features (R, C) in fp32, of xT (DK, C)."""
    i, j = row_pairs(t, zero, d, PAIR_TILES, PAIR_ROWS, REST_ROWS)
    a = tl.dot(picker_transposed(i, DK, xT), xT, input_precision=PRECISION)
    if t < PAIR_TILES:
        b = tl.dot(picker_transposed(j, DK, xT), xT, input_precision=PRECISION)
    else:
        b = a
    return products(a, b, tl.arange(0, a.shape[0])[:, None], t, d, PAIR_TILES, PAIR_ROWS)


@triton.jit
def features_gradient(
    dphi, a, b, dx, t: tl.constexpr, zero, d: tl.constexpr, DK: tl.constexpr, PAIR_TILES: tl.constexpr,
    PAIR_ROWS: tl.constexpr, REST_ROWS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx (C, DK) plus the gradient of x that follows from dphi (C, R), the gradient of tile t's bare features."""
    i, j = row_pairs(t, zero, d, PAIR_TILES, PAIR_ROWS, REST_ROWS)
    like = tl.zeros((1, 1), WIDE)
    if t < PAIR_TILES:
        dx = tl.dot((dphi * b).to(WIDE), picker_transposed(i, DK, like), dx, input_precision=PRECISION)
        dx = tl.dot((dphi * a).to(WIDE), picker_transposed(j, DK, like), dx, input_precision=PRECISION)
    else:
        r = tl.arange(0, REST_ROWS)[None, :]
        da = tl.where(r < d, dphi, 2.0 * dphi * a)
        dx = tl.dot(da.to(WIDE), picker_transposed(i, DK, like), dx, input_precision=PRECISION)
    return dx
