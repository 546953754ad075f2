// The query side: one warpgroup that turns a chunk of queries, the chunk's keys and values and the state before the chunk
// into outputs:  o_i = (sum_{j <= i} p_ij v_j + phi(q_i) S) / (sum_{j <= i} p_ij + phi(q_i) z),  p = 1 + s + s^2 / 2.
//
// Thread layout of an accumulator (m64): rows g and g + 8 of the warp's 16, columns 8 n + 2 t and + 1; g = lane / 4, t = lane % 4.
#pragma once

#include "state.cuh"

namespace jrt {

// A fragments of phi(q) for slabs kFirst .. kFirst + kCount - 1, from the two rows of q that this thread's fragments hold.
template <typename Elem, int kFirst, int kCount>
__device__ __forceinline__ void build_query_features(uint32_t (&a)[kCount][4], uint32_t q_tile, int warp, int lane) {
    const int t = lane & 3, g = lane >> 2;
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
        const int row = 16 * warp + g + 8 * upper;
        uint32_t y[6];  // pairs (y_0, y_1) .. (y_10, y_11) of the row rotated by 4 t
#pragma unroll
        for (int j = 0; j < 3; ++j) {
            const int quad = (j + t) & 3;
            const uint2 pairs = load_shared_8(q_tile + row32(row, quad >> 1) + 8 * (quad & 1));
            y[2 * j] = pairs.x, y[2 * j + 1] = pairs.y;
        }
        uint32_t m[5];  // pairs (y_1, y_2), (y_3, y_4) ..
#pragma unroll
        for (int j = 0; j < 5; ++j) m[j] = straddle2(y[j], y[j + 1]);

#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const int slab = kFirst + i;
            if (slab < 8) {
                a[i][upper] = multiply2<Elem>(y[0], slab & 1 ? m[slab / 2] : y[slab / 2]);
                a[i][2 + upper] = multiply2<Elem>(y[1], slab & 1 ? m[slab / 2 + 1] : y[slab / 2 + 1]);
            } else if (slab == 8) {
                a[i][upper] = t < 2 ? multiply2<Elem>(y[0], y[4]) : multiply2<Elem>(y[1], y[5]);
                a[i][2 + upper] = t == 0 ? kOne<Elem> : 0u;
            } else {
                a[i][upper] = y[0];
                a[i][2 + upper] = y[1];
            }
        }
    }
}

// Bit 4 n + i: is accumulator 4 n + i at or below the diagonal?
__device__ __forceinline__ uint32_t causal_bits(int warp, int lane) {
    const int before = 16 * warp + (lane >> 2) - 2 * (lane & 3);  // row - first column
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(8 * (i >> 2) + (i & 1) <= before + 8 * ((i >> 1) & 1)) << i;
    return bits;
}

// Scores to probabilities-before-division, in place, causal; adds each row's sum to row_sum and packs them as A fragments.
template <typename Elem, bool kMask>
__device__ __forceinline__ void taylor_scores(float (&s)[32], uint32_t (&p)[4][4], float (&row_sum)[2], uint32_t causal, int lane,
                                              uint2 counts) {
    const int t = lane & 3;
    row_sum[0] = row_sum[1] = 0.0f;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int column = 8 * n + (i & 1);  // relative to 2 t
            const float x = s[4 * n + i];        // q.k, not yet / 4
            float w = fmaf(x, fmaf(x, 0.03125f, 0.25f), 1.0f);
            bool keep = (causal >> (4 * n + i)) & 1;
            if (kMask) keep = keep && ((((n < 4 ? counts.x : counts.y) >> (2 * t)) >> (column & 31)) & 1);
            w = keep ? w : 0.0f;
            row_sum[i >> 1] += w;
            s[4 * n + i] = w * kRangeScale<Elem>;
        }
    }
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) p[step][i] = pack2<Elem>(s[8 * step + 2 * i], s[8 * step + 2 * i + 1]);
    }
}

// phi(q).z of this thread's two rows from the moments: z_0 + q.z_1 / 4 + q^T G q / 32, summed over the four lanes of a row
// together with `row_sum`.
template <typename Elem>
__device__ __forceinline__ void denominators(float (&result)[2], const float (&row_sum)[2], uint32_t q_tile, uint32_t moments,
                                             int warp, int lane) {
    constexpr float scale = kRangeScale<Elem>;
    uint32_t q[4];  // rows (g, g + 8, g, g + 8) x dims (2t, 2t, 2t + 8, 2t + 8)
    load_matrix_x4(q, q_tile + row32(16 * warp + (lane & 15), lane >> 4));
    const uint4 high = load_shared_16(moments + lane * 16);
    const uint4 low = load_shared_16(moments + 512 + lane * 16);
    const uint4 sum = load_shared_16(moments + 1024 + lane * 16);
    const float s0 = 8 * scale * __uint_as_float(sum.x), s1 = 8 * scale * __uint_as_float(sum.y);
    const float s2 = 8 * scale * __uint_as_float(sum.z), s3 = 8 * scale * __uint_as_float(sum.w);
    float left[4] = {s0, s1, s0, s1};   // 8 z_1 + q G, dims 2t, 2t + 1
    float right[4] = {s2, s3, s2, s3};  // dims 2t + 8, 2t + 9
    mma_16x8x16<Elem>(left, q, high.x, high.y);
    mma_16x8x16<Elem>(right, q, high.z, high.w);
    mma_16x8x16<Elem>(left, q, low.x, low.y);
    mma_16x8x16<Elem>(right, q, low.z, low.w);
    const float count = load_shared_float(moments + 1536);
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
        const float2 near = unpack2<Elem>(q[upper]), far = unpack2<Elem>(q[2 + upper]);
        const float inner = near.x * left[2 * upper] + near.y * left[2 * upper + 1] + far.x * right[2 * upper] +
                            far.y * right[2 * upper + 1];
        float sum = fmaf(inner, 1.0f / (32 * scale), row_sum[upper]);
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        result[upper] = sum + count;
    }
}

// Writes the warp's 16 x 64 outputs to its staging tile (128-byte rows, 128-byte swizzle).
template <typename Elem>
__device__ __forceinline__ void stage_outputs(const float (&o)[32], const float (&factor)[2], uint32_t tile, int lane) {
    const int row = lane & 15;
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
        const uint32_t address = tile + row * 128 + (((n + (lane >> 4)) ^ (row & 7)) << 4);
        store_matrix_x4(address, pack2<Elem>(o[4 * n] * factor[0], o[4 * n + 1] * factor[0]),
                        pack2<Elem>(o[4 * n + 2] * factor[1], o[4 * n + 3] * factor[1]),
                        pack2<Elem>(o[4 * n + 4] * factor[0], o[4 * n + 5] * factor[0]),
                        pack2<Elem>(o[4 * n + 6] * factor[1], o[4 * n + 7] * factor[1]));
    }
}

}  // namespace jrt
