// The key side: one warpgroup that keeps the running state of a head in its registers and adds one chunk of tokens at a time.
//
// Per thread: sums[80], the accumulators of S^T (64 columns of v x 160 internal features) of m64n160k16, and moments[8]:
// in warp 0 the Gram matrix sum k k^T (16 x 16), in warp 1 the sum of k. The denominator needs no more than those two, in
// fp32, so its sums are exact products of the inputs.
#pragma once

#include "features.cuh"
#include "products.cuh"

namespace jrt {

constexpr int kChunk = 64;     // tokens
constexpr int kColumns = 64;   // columns of v that a block handles
constexpr int kWarpgroup = 128;

constexpr uint32_t kKeyTileBytes = kChunk * kDim * 2;       // q or k: 64 rows of 32 bytes, 32-byte swizzle
constexpr uint32_t kValueTileBytes = kChunk * kColumns * 2;  // v: 64 rows of 128 bytes, 128-byte swizzle
constexpr uint32_t kSlabBytes = 64 * kSlabFeatures * 2;      // 64 rows of 32 bytes, 32-byte swizzle
constexpr uint32_t kPhiBytes = kSlabs * kSlabBytes;
// Moments as the query side reads them: Gram matrix fragments (high halves, low halves), sum of k, count.
constexpr uint32_t kMomentBytes = 3 * 512 + 128;

// fp16 has little range, so what is rounded to it (scores, the copies of S and of the moments) is scaled down first.
template <typename Elem>
constexpr float kRangeScale = std::is_same<Elem, __half>::value ? 1.0f / 256 : 1.0f;

template <typename Elem>
constexpr int kOne = std::is_same<Elem, __half>::value ? 0x3c00 : 0x3f80;  // 1.0, low half

// 2^power, twice: multiplying by it is exact.
template <typename Elem, int power>
constexpr uint32_t kPowerPair =
    static_cast<uint32_t>(kOne<Elem> + power * (std::is_same<Elem, __half>::value ? 0x400 : 0x80)) * 0x10001u;

// Byte offset of 16-byte half `half` of row `row` in a tile of 32-byte rows with the 32-byte swizzle.
__device__ __forceinline__ uint32_t row32(int row, int half) {
    return static_cast<uint32_t>(row * 32 + ((half ^ ((row >> 2) & 1)) << 4));
}

// One thread writes half a token's features: positions 8 half .. 8 half + 7 of every slab. kWeighted: times `weight`; then the
// constant feature is written as well.
template <typename Elem, bool kMask, bool kWeighted = false>
__device__ __forceinline__ void write_key_features(uint32_t phi, uint32_t k_tile, int token, int half, bool counts,
                                                   float weight = 1.0f) {
    const uint4 first = load_shared_16(k_tile + row32(token, 0));
    const uint4 second = load_shared_16(k_tile + row32(token, 1));
    const uint32_t raw[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
    uint32_t r[8];  // pairs (x_2j, x_2j+1) of the row rotated by 2 half
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        r[j] = half ? raw[(j + 1) & 7] : raw[j];
        if (kMask && !counts) r[j] = 0;
    }
    const auto scaled = [&](uint32_t pair) {  // / 16
        if (!kWeighted) return multiply2<Elem>(pair, kPowerPair<Elem, -4>);
        const float2 x = unpack2<Elem>(pair);
        return pack2<Elem>(x.x * (weight / 16), x.y * (weight / 16));
    };
    uint32_t s[4];  // the pairs of this thread's positions, scaled
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] = scaled(r[2 * i]);
    const uint32_t row = phi + row32(token, half);
    // Slabs that share straddling pairs follow each other, so that few of those are alive at a time.
    constexpr int order[8] = {0, 2, 4, 6, 1, 5, 3, 7};
#pragma unroll
    for (int step = 0; step < 8; ++step) {
        const int slab = order[step];
        uint32_t f[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int j = (2 * i + slab / 2) & 7;
            f[i] = multiply2<Elem>(s[i], slab & 1 ? straddle2(r[j], r[(j + 1) & 7]) : r[j]);
            if (slab == 0) f[i] = multiply2<Elem>(f[i], kPowerPair<Elem, -1>);
        }
        store_shared_16(row + slab * kSlabBytes, f[0], f[1], f[2], f[3]);
    }
    if (half == 0) {
        const uint32_t a = scaled(r[1]), b = scaled(r[3]);
        store_shared_16(row + 8 * kSlabBytes, multiply2<Elem>(s[0], r[4]), multiply2<Elem>(s[1], r[6]),
                        multiply2<Elem>(a, r[5]), multiply2<Elem>(b, r[7]));
    } else if (kWeighted) {
        store_shared_16(row + 8 * kSlabBytes, pack2<Elem>(weight, 0.0f), 0u, 0u, 0u);
    } else if (kMask) {
        store_shared_16(row + 8 * kSlabBytes, counts ? kOne<Elem> : 0u, 0u, 0u, 0u);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] = multiply2<Elem>(s[i], kPowerPair<Elem, 2>);
    store_shared_16(row + 9 * kSlabBytes, s[0], s[1], s[2], s[3]);
}

// The constant feature of every token; without a mask it never changes.
template <typename Elem>
__device__ __forceinline__ void write_constant_feature(uint32_t phi, int token) {
    store_shared_16(phi + 8 * kSlabBytes + row32(token, 1), kOne<Elem>, 0u, 0u, 0u);
}

// 16 tokens of v, MN-major.
__device__ __forceinline__ uint64_t value_descriptor(uint32_t v_tile, int step) {
    return matrix_descriptor(v_tile, step * 16 * 128, kValueTileBytes, 1024, Swizzle::k128);
}

// Starts S^T += V^T phi(k) on the tensor cores.
template <typename Elem>
__device__ __forceinline__ void start_state_update(float (&sums)[80], uint32_t v_tile, uint32_t phi) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kChunk / 16; ++step) {
        wgmma_state_update<Elem>(sums, value_descriptor(v_tile, step),
                                 matrix_descriptor(phi, step * 16 * 32, kSlabBytes, 256, Swizzle::k32), 1);
    }
    wgmma_commit();
}

// Both tokens of a pair, as a bit mask on two packed values. `token` is even.
__device__ __forceinline__ uint32_t pair_bits(uint2 counts, int token) {
    const uint32_t bits = (token < 32 ? counts.x : counts.y) >> (token & 31);
    return (bits & 1 ? 0x0000ffffu : 0u) | (bits & 2 ? 0xffff0000u : 0u);
}

// Warp 0: moments += sum k k^T. Warp 1: moments += sum k (every row of the product is the same).
template <typename Elem, bool kMask>
__device__ __forceinline__ void add_moments(float (&moments)[8], uint32_t k_tile, int warp, int lane, uint2 counts) {
    float low[4] = {moments[0], moments[1], moments[2], moments[3]};
    float high[4] = {moments[4], moments[5], moments[6], moments[7]};
    const uint32_t ones = kPowerPair<Elem, 0>;
    const uint32_t address = k_tile + row32((lane & 7) + 8 * (lane >> 4), (lane >> 3) & 1);
#pragma unroll
    for (int step = 0; step < kChunk / 16; ++step) {
        uint32_t k[4];  // dims (g, g + 8, g, g + 8) x tokens (2t, 2t, 2t + 8, 2t + 8), each with its neighbour
        load_matrix_x4_transposed(k, address + step * 16 * 32);
        if (kMask) {
            const int token = 16 * step + 2 * (lane & 3);
            const uint32_t near = pair_bits(counts, token), far = pair_bits(counts, token + 8);
            k[0] &= near, k[1] &= near, k[2] &= far, k[3] &= far;
        }
        uint32_t left[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) left[i] = warp == 0 ? k[i] : ones;
        mma_16x8x16<Elem>(low, left, k[0], k[2]);
        mma_16x8x16<Elem>(high, left, k[1], k[3]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) moments[i] = low[i], moments[4 + i] = high[i];
}

// Rounds S to 16 bits for the query side: slabs of [column of v][16 features].
template <typename Elem>
__device__ __forceinline__ void publish_state(const float (&sums)[80], uint32_t copy, int warp, int lane) {
    const uint32_t address = copy + row32(16 * warp + (lane & 15), lane >> 4);
    constexpr float scale = kRangeScale<Elem>;
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
        uint32_t packed[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            packed[i] = pack2<Elem>(sums[8 * slab + 2 * i] * scale, sums[8 * slab + 2 * i + 1] * scale);
        }
        store_matrix_x4(address + slab * kSlabBytes, packed[0], packed[1], packed[2], packed[3]);
    }
}

// Fragments of the Gram matrix (as the sum of two 16-bit numbers), the sum of k and the count, one 16-byte row per lane.
template <typename Elem>
__device__ __forceinline__ void publish_moments(const float (&moments)[8], float count, uint32_t copy, int warp, int lane) {
    if (warp == 0) {
        uint32_t high[4], low[4];
        // B fragments of G for n = g and n = g + 8 are its own accumulators, because G is symmetric.
        const int order[4] = {0, 4, 2, 6};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float x = moments[order[i]] * kRangeScale<Elem>, y = moments[order[i] + 1] * kRangeScale<Elem>;
            high[i] = pack2<Elem>(x, y);
            const float2 rounded = unpack2<Elem>(high[i]);
            low[i] = pack2<Elem>(x - rounded.x, y - rounded.y);
        }
        store_shared_16(copy + lane * 16, high[0], high[1], high[2], high[3]);
        store_shared_16(copy + 512 + lane * 16, low[0], low[1], low[2], low[3]);
    } else if (warp == 1) {
        store_shared_16(copy + 1024 + lane * 16, __float_as_uint(moments[0]), __float_as_uint(moments[1]),
                        __float_as_uint(moments[4]), __float_as_uint(moments[5]));
        if (lane == 0) store_shared_float(copy + 1536, count);
    }
    __syncwarp();  // the barrier that follows counts a warp at once
}

// ---- the state in device memory: S (153, value_dim) and z (153), documented order, fp32 --------------------------------

// Hides from the compiler where a value comes from: it would otherwise keep the 80 addresses of the first read of the state
// in registers until the last write.
__device__ __forceinline__ void forget_origin(int& value) { asm volatile("" : "+r"(value)); }

// Calls visit(index into sums, feature, column) for each of this thread's accumulators.
template <typename Visit>
__device__ __forceinline__ void for_each_sum(int warp, int lane, Visit visit) {
    forget_origin(lane);
    const int t = lane & 3, g = lane >> 2;
#pragma unroll
    for (int tile = 0; tile < 2 * kSlabs; ++tile) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const Feature feature = documented_feature(tile / 2, 8 * (tile & 1) + 2 * t + e);
            visit(4 * tile + e, feature, 16 * warp + g);
            visit(4 * tile + 2 + e, feature, 16 * warp + g + 8);
        }
    }
}

// All loads are on their way before the first value is used.
__device__ __forceinline__ void read_state(float (&sums)[80], const float* S, int columns, int value_dim, int warp, int lane) {
    for_each_sum(warp, lane, [&](int i, Feature feature, int column) {
        const bool present = S != nullptr && feature.index >= 0 && column < columns;
        sums[i] = present ? S[feature.index * value_dim + column] : 0.0f;
    });
    for_each_sum(warp, lane, [&](int i, Feature feature, int) { sums[i] *= 1.0f / feature.scale; });
}

__device__ __forceinline__ void write_state(const float (&sums)[80], float* S, int columns, int value_dim, int warp, int lane) {
    for_each_sum(warp, lane, [&](int i, Feature feature, int column) {
        if (feature.index >= 0 && column < columns) S[feature.index * value_dim + column] = sums[i] * feature.scale;
    });
}

// Calls visit(index into moments, feature, is it the first of its equals) for the two warps that hold moments.
template <typename Visit>
__device__ __forceinline__ void for_each_moment(int warp, int lane, Visit visit) {
    forget_origin(lane);
    const int t = lane & 3, g = lane >> 2;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int row = g + 8 * ((i >> 1) & 1), column = 2 * t + (i & 1) + 8 * (i >> 2);
        if (warp == 0) {
            visit(i, Feature{pair_index(row, column), row == column ? kSquareScale : kPairScale}, row <= column);
        } else if (warp == 1) {
            visit(i, Feature{1 + column, kFirstScale}, row == 0);
        }
    }
}

// Returns the count, z[0].
__device__ __forceinline__ float read_moments(float (&moments)[8], const float* z, int warp, int lane) {
#pragma unroll
    for (int i = 0; i < 8; ++i) moments[i] = 0.0f;
    if (z == nullptr) return 0.0f;
    for_each_moment(warp, lane, [&](int i, Feature feature, bool) { moments[i] = z[feature.index] / feature.scale; });
    return z[0];
}

__device__ __forceinline__ void write_moments(const float (&moments)[8], float count, float* z, int warp, int lane) {
    for_each_moment(warp, lane, [&](int i, Feature feature, bool first) {
        if (first) z[feature.index] = moments[i] * feature.scale;
    });
    if (warp == 1 && lane == 0) z[0] = count;
}

}  // namespace jrt
