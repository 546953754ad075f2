// The sums behind the denominator for the state side of the backward kernels, in fp32: sum c x x^T (16 x 16), sum c x and sum c
// over tokens, with c = 1 for keys or the weights of queries. Published as by `publish_moments`.
//
// Warp h = 0, 1 holds the columns 8 h .. 8 h + 7 of the first two, as accumulators; warp 2 publishes and writes the count.
#pragma once

#include "state.cuh"

namespace jrt {

struct Moments {
    float gram[4];  // rows g (0, 1) and g + 8 (2, 3), columns 8 h + 2 t and + 1
    float sum[4];   // the same columns; all rows are equal
    float count;    // of a weighted sum in warp 2 only

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < 4; ++i) gram[i] = sum[i] = 0.0f;
        count = 0.0f;
    }

    // Adds a chunk of keys; `tokens` of them are no padding.
    template <bool kMask>
    __device__ __forceinline__ void add_keys(uint32_t tile, int warp, int lane, uint2 counts, int tokens) {
        count += tokens;
        if (warp >= 2) return;
#pragma unroll
        for (int step = 0; step < kChunk / 16; ++step) {
            uint32_t x[4];
            load(x, tile, step, lane);
            uint32_t right[2] = {warp == 0 ? x[0] : x[1], warp == 0 ? x[2] : x[3]};
            if (kMask) {
                const int token = 16 * step + 2 * (lane & 3);
                right[0] &= pair_bits(counts, token), right[1] &= pair_bits(counts, token + 8);
            }
            multiply(x, right);
        }
    }

    // Adds a chunk of queries with their weights c (64 floats in shared memory). c x is the sum of two 16-bit numbers, so that
    // its rounding does not show.
    __device__ __forceinline__ void add_queries(uint32_t tile, uint32_t weights, int warp, int lane) {
        if (warp == 2) {
            float chunk = load_shared_float(weights + lane * 4) + load_shared_float(weights + (32 + lane) * 4);
#pragma unroll
            for (int distance = 16; distance > 0; distance /= 2) chunk += __shfl_xor_sync(~0u, chunk, distance);
            count += chunk;
        }
        if (warp >= 2) return;
#pragma unroll
        for (int step = 0; step < kChunk / 16; ++step) {
            uint32_t x[4], large[2], small[2];
            load(x, tile, step, lane);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint2 c = load_shared_8(weights + (16 * step + 8 * i + 2 * (lane & 3)) * 4);
                const float2 own = unpack2<__nv_bfloat16>(warp == 0 ? x[2 * i] : x[2 * i + 1]);
                const float a = own.x * __uint_as_float(c.x), b = own.y * __uint_as_float(c.y);
                large[i] = pack2<__nv_bfloat16>(a, b);
                const float2 rounded = unpack2<__nv_bfloat16>(large[i]);
                small[i] = pack2<__nv_bfloat16>(a - rounded.x, b - rounded.y);
            }
            multiply(x, large);
            multiply(x, small);
        }
    }

    __device__ __forceinline__ void publish(uint32_t copy, int warp, int lane) const {
        if (warp < 2) {
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                const float x = gram[2 * row], y = gram[2 * row + 1];
                const uint32_t large = pack2<__nv_bfloat16>(x, y);
                const float2 rounded = unpack2<__nv_bfloat16>(large);
                const uint32_t at = copy + lane * 16 + (2 * row + warp) * 4;
                store_shared_word(at, large);
                store_shared_word(at + 512, pack2<__nv_bfloat16>(x - rounded.x, y - rounded.y));
            }
            store_shared_float(copy + 1024 + lane * 16 + 8 * warp, sum[0]);
            store_shared_float(copy + 1024 + lane * 16 + 8 * warp + 4, sum[1]);
        } else if (warp == 2 && lane == 0) {
            store_shared_float(copy + 1536, count);
        }
        __syncwarp();
    }

    // z (153) in device memory, documented order; nullptr: zero.
    __device__ __forceinline__ void read(const float* z, int warp, int lane) {
        clear();
        if (z == nullptr) return;
        count = z[0];
        if (warp >= 2) return;
        const int t = lane & 3, g = lane >> 2;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = g + 8 * (i >> 1), column = 8 * warp + 2 * t + (i & 1);
            gram[i] = z[pair_index(row, column)] * (row == column ? 1 / kSquareScale : 1 / kPairScale);
            sum[i] = z[1 + column] * (1 / kFirstScale);
        }
    }
    __device__ __forceinline__ void write(float* z, int warp, int lane) const {
        if (warp == 2 && lane == 0) z[0] = count;
        if (warp >= 2) return;
        const int t = lane & 3, g = lane >> 2;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = g + 8 * (i >> 1), column = 8 * warp + 2 * t + (i & 1);
            if (row <= column) z[pair_index(row, column)] = gram[i] * (row == column ? kSquareScale : kPairScale);
            if (row == 0) z[1 + column] = sum[i] * kFirstScale;
        }
    }

  private:
    // 16 tokens: dims (g, g + 8, g, g + 8) x tokens (2 t, 2 t, 2 t + 8, 2 t + 8), each with its neighbour.
    static __device__ __forceinline__ void load(uint32_t (&x)[4], uint32_t tile, int step, int lane) {
        load_matrix_x4_transposed(x, tile + row32((lane & 7) + 8 * (lane >> 4), (lane >> 3) & 1) + step * 16 * 32);
    }
    __device__ __forceinline__ void multiply(const uint32_t (&x)[4], const uint32_t (&right)[2]) {
        constexpr uint32_t one = kPowerPair<__nv_bfloat16, 0>;
        const uint32_t ones[4] = {one, one, one, one};
        mma_16x8x16<__nv_bfloat16>(gram, x, right[0], right[1]);
        mma_16x8x16<__nv_bfloat16>(sum, ones, right[0], right[1]);
    }
};

}  // namespace jrt
