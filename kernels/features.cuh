// The order in which the kernels keep the features of phi(x) for d = 16, and its map to the documented order.
//
// Inside a kernel the 153 features are laid out as 10 slabs of 16 (one k-step of a tensor-core product each):
//   slab 0..7   the products x_i x_{(i + slab) mod 16}: by circular distance, so that a thread that holds its row rotated
//               builds every slab with the same registers and each unordered pair occurs exactly once
//   slab 8      positions 0..7: the 8 products at distance 8; position 8: the constant 1; positions 9..15: zero
//   slab 9      the 16 values x_i
// Position p of a slab belongs to i = 4 ((p mod 8) / 2) + 2 (p / 8) + p mod 2: the four positions that a thread holds in an
// A fragment are then four consecutive i. All weights are powers of two and sit on the key's side: x_i x_j / 16, x_i^2 / 32,
// x_i / 4 and 1 for a key, plain products for a query. `Feature::scale` turns a sum of key features into the documented one.
#pragma once

#include <cstdint>

namespace jrt {

constexpr int kDim = 16;                                     // d, the query and key size
constexpr int kFeatures = 1 + kDim + kDim * (kDim + 1) / 2;  // 153, documented
constexpr int kSlabs = 10;
constexpr int kSlabFeatures = 16;

struct Feature {
    int index;    // in the documented order [1, x / 2, pairs i <= j row by row]; -1: no feature
    float scale;  // documented sum = scale * the kernel's sum
};

__host__ __device__ constexpr int pair_index(int i, int j) {
    const int a = i < j ? i : j;
    const int b = i < j ? j : i;
    return 1 + kDim + a * kDim - a * (a - 1) / 2 + (b - a);
}

__host__ __device__ constexpr int position_dim(int position) {
    return 4 * ((position & 7) >> 1) + 2 * (position >> 3) + (position & 1);
}

constexpr float kFirstScale = 0.5f;                     // 1 / d^(1/4)
constexpr float kPairScale = 0.25f;                     // 1 / sqrt(d)
constexpr float kSquareScale = 0.17677669529663687f;    // 1 / sqrt(2 d)

__host__ __device__ constexpr Feature documented_feature(int slab, int position) {
    const int i = position_dim(position);
    if (slab < 8) return {pair_index(i, (i + slab) & 15), slab == 0 ? 32 * kSquareScale : 16 * kPairScale};
    if (slab == 9) return {1 + i, 4 * kFirstScale};
    if (position > 8) return {-1, 1.0f};
    if (position == 8) return {0, 1.0f};
    const int first = position < 4 ? i : i + 2;  // 0, 1, 4, 5, 10, 11, 14, 15
    return {pair_index(first, (first + 8) & 15), 16 * kPairScale};
}

}  // namespace jrt
