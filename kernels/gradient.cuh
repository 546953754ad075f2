// From the gradients of features to the gradients of a row of q or k: the chain rule of the map in features.cuh, for the rows
// g and g + 8 that a thread holds of an accumulator (g = lane / 4, t = lane % 4).
//
// The thread holds the positions of every slab that belong to dims 4 t .. 4 t + 3. Their partners lie at most 8 dims further
// on, so its row rotated by 4 t is all that it needs: y_j = x_((4 t + j) mod 16), j = 0 .. 11.
#pragma once

#include "state.cuh"

namespace jrt {

template <typename Elem>
__device__ __forceinline__ void load_rotated_row(float (&y)[12], uint32_t tile, int row, int t) {
#pragma unroll
    for (int j = 0; j < 3; ++j) {
        const int quad = (j + t) & 3;
        const uint2 pairs = load_shared_8(tile + row32(row, quad >> 1) + 8 * (quad & 1));
        const float2 first = unpack2<Elem>(pairs.x), second = unpack2<Elem>(pairs.y);
        y[4 * j] = first.x, y[4 * j + 1] = first.y, y[4 * j + 2] = second.x, y[4 * j + 3] = second.y;
    }
}

// dy += what follows from the gradients of slabs kFirst .. kFirst + 4, those of second order, for row g (upper = 0) or g + 8 (1).
template <int kFirst>
__device__ __forceinline__ void add_row_gradient(float (&dy)[12], const float (&y)[12], const float (&dphi)[40], int upper,
                                                 int t) {
#pragma unroll
    for (int i = 0; i < 5; ++i) {
        const int slab = kFirst + i;
        const float own[4] = {dphi[8 * i + 2 * upper], dphi[8 * i + 2 * upper + 1],  // dims 4 t .. 4 t + 3
                              dphi[8 * i + 2 * upper + 4], dphi[8 * i + 2 * upper + 5]};
        if (slab == 8) {  // dims 0, 1, 4, 5, 10, 11, 14, 15 and those 8 further on; own[2] and own[3] are no products
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float near = own[e] * (t < 2 ? y[e] : y[2 + e]), far = own[e] * (t < 2 ? y[8 + e] : y[10 + e]);
                dy[e] += t < 2 ? far : 0.0f, dy[8 + e] += t < 2 ? near : 0.0f;
                dy[2 + e] += t < 2 ? 0.0f : far, dy[10 + e] += t < 2 ? 0.0f : near;
            }
        } else if (slab < 8) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (slab == 0) {
                    dy[j] = fmaf(2 * own[j], y[j], dy[j]);
                } else {
                    dy[j] = fmaf(own[j], y[j + slab], dy[j]);
                    dy[j + slab] = fmaf(own[j], y[j], dy[j + slab]);
                }
            }
        }
    }
}

// After all slabs of second order: adds the first order to dy, from dphi of slabs 5 .. 9. Returns phi(x) . dphi, this thread's
// part; that of second order is half of x . dx (Euler's theorem).
__device__ __forceinline__ float add_first_order(float (&dy)[12], const float (&y)[12], const float (&dphi)[40], int upper,
                                                 int t) {
    constexpr int constant = 8 * (8 - 5) + 4, first_order = 8 * (9 - 5);  // slab 8, position 8; slab 9
    float value = t == 0 ? dphi[constant + 2 * upper] : 0.0f;
#pragma unroll
    for (int j = 0; j < 12; ++j) value = fmaf(0.5f * y[j], dy[j], value);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const float own = dphi[first_order + 4 * (j >> 1) + 2 * upper + (j & 1)];
        value = fmaf(own, y[j], value);
        dy[j] += own;
    }
    return value;
}

// The gradient of dims 4 t .. 4 t + 3, from the parts of the four threads of a row.
__device__ __forceinline__ float4 gather_row_gradient(const float (&dy)[12], int lane) {
    const int row = lane & ~3, t = lane & 3;
    float r[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        r[j] = dy[j] + __shfl_sync(~0u, dy[4 + j], row | ((t + 3) & 3)) + __shfl_sync(~0u, dy[8 + j], row | ((t + 2) & 3));
    }
    return make_float4(r[0], r[1], r[2], r[3]);
}

// The sum over the four threads of a row.
__device__ __forceinline__ float sum_of_row(float part) {
    part += __shfl_xor_sync(~0u, part, 1);
    return part + __shfl_xor_sync(~0u, part, 2);
}

// Dims 4 t .. 4 t + 3 of a row that lies as in accumulators: `low` has dims 2 t and 2 t + 1, `high` those 8 further on.
__device__ __forceinline__ float4 gather_accumulators(float2 low, float2 high, int lane) {
    const int t = lane & 3, source = (lane & ~3) | (2 * (t & 1));
    const auto pick = [&](float near, float far, int from) {
        const float a = __shfl_sync(~0u, near, from), b = __shfl_sync(~0u, far, from);
        return t < 2 ? a : b;
    };
    return make_float4(pick(low.x, high.x, source), pick(low.y, high.y, source), pick(low.x, high.x, source + 1),
                       pick(low.y, high.y, source + 1));
}

// What the published moments give the 16 rows of a warp. Layout of accumulators: low has dims 2 t, 2 t + 1 of row g (0, 1) and of
// row g + 8 (2, 3); high has dims 8 further on.
struct RowMoments {
    float low[4], high[4];  // x G
    uint4 sum;              // z_1, as floats
    uint32_t x[4];          // the rows: (g, g + 8, g, g + 8) x dims (2 t, 2 t, 2 t + 8, 2 t + 8)

    template <typename Elem>
    __device__ __forceinline__ void load(uint32_t tile, uint32_t moments, int warp, int lane) {
        load_matrix_x4(x, tile + row32(16 * warp + (lane & 15), lane >> 4));
        const uint4 large = load_shared_16(moments + lane * 16), small = load_shared_16(moments + 512 + lane * 16);
        sum = load_shared_16(moments + 1024 + lane * 16);
#pragma unroll
        for (int i = 0; i < 4; ++i) low[i] = high[i] = 0.0f;
        mma_16x8x16<Elem>(low, x, large.x, large.y);
        mma_16x8x16<Elem>(high, x, large.z, large.w);
        mma_16x8x16<Elem>(low, x, small.x, small.y);
        mma_16x8x16<Elem>(high, x, small.z, small.w);
    }
    // (phi(x) . z) less the count, this thread's part: x . z_1 / 4 + x^T G x / 32.
    template <typename Elem>
    __device__ __forceinline__ float value(int upper) const {
        const float2 near = unpack2<Elem>(x[upper]), far = unpack2<Elem>(x[2 + upper]);
        const float inner = near.x * fmaf(8.0f, __uint_as_float(sum.x), low[2 * upper]) +
                            near.y * fmaf(8.0f, __uint_as_float(sum.y), low[2 * upper + 1]) +
                            far.x * fmaf(8.0f, __uint_as_float(sum.z), high[2 * upper]) +
                            far.y * fmaf(8.0f, __uint_as_float(sum.w), high[2 * upper + 1]);
        return inner / 32;
    }
    // The gradient of phi(x) . z with respect to x: z_1 / 4 + x G / 16.
    __device__ __forceinline__ float2 low_gradient(int upper) const {
        return make_float2(fmaf(0.25f, __uint_as_float(sum.x), low[2 * upper] / 16),
                           fmaf(0.25f, __uint_as_float(sum.y), low[2 * upper + 1] / 16));
    }
    __device__ __forceinline__ float2 high_gradient(int upper) const {
        return make_float2(fmaf(0.25f, __uint_as_float(sum.z), high[2 * upper] / 16),
                           fmaf(0.25f, __uint_as_float(sum.w), high[2 * upper + 1] / 16));
    }
};

// low, high += A X: A = 16 x 64 weights, X = 64 tokens x 16 dims of q or k in shared memory.
template <typename Elem>
__device__ __forceinline__ void multiply_rows(float (&low)[4], float (&high)[4], const uint32_t (&weights)[4][4], uint32_t tile,
                                              int lane) {
    const uint32_t address = tile + row32(lane & 15, lane >> 4);
#pragma unroll
    for (int step = 0; step < kChunk / 16; ++step) {
        uint32_t x[4];  // tokens (2 t, 2 t + 8, 2 t, 2 t + 8), each with its neighbour, x dims (g, g, g + 8, g + 8)
        load_matrix_x4_transposed(x, address + step * 16 * 32);
        mma_16x8x16<Elem>(low, weights[step], x[0], x[1]);
        mma_16x8x16<Elem>(high, weights[step], x[2], x[3]);
    }
}

// A fragments of a 64 x 64 accumulator, rounded to 16 bits.
template <typename Elem>
__device__ __forceinline__ void pack_accumulators(uint32_t (&a)[4][4], const float (&x)[32]) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[step][i] = pack2<Elem>(x[8 * step + 2 * i], x[8 * step + 2 * i + 1]);
    }
}

}  // namespace jrt
