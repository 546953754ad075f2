// dq, w and c of a text, chunk by chunk forward in time (backward.cuh). With s = q . k / 4, inside a chunk
//
//   dP = do v^T,  ds = (dP - do . o) (1 + s) / 4,  dq = w (ds k + the gradient through the state before the chunk)
//
// and through that state dphi(q) = do S^T - (do . o) z. The state side is that of the forward pass (KeySide in prefill.cuh); it
// computes do . o as well. That product carries the rounding of o to bf16. So c takes, where a block has all columns of v, the
// product of do with the numerator, which is sum_j P_j dP_j + phi(q) . (do S^T).
#pragma once

#include "backward.cuh"

namespace jrt {

// Shared memory, from a 1024-byte boundary.
constexpr uint32_t kQueryDout = kValueTileBytes;  // within a stage, after v
constexpr uint32_t kQueryOut = 2 * kValueTileBytes;
constexpr uint32_t kQueryQ = 3 * kValueTileBytes;
constexpr uint32_t kQueryK = kQueryQ + kKeyTileBytes;
constexpr uint32_t kQueryStageBytes = kQueryK + kKeyTileBytes;
constexpr uint32_t kQueryPhi = kBackwardStages * kQueryStageBytes;
constexpr uint32_t kQueryState = kQueryPhi + 2 * kPhiBytes;
constexpr uint32_t kQueryMoments = kQueryState + 2 * kPhiBytes;
constexpr uint32_t kQueryDelta = kQueryMoments + 2 * kMomentBytes;  // do . o of two chunks
constexpr uint32_t kQueryBarriers = kQueryDelta + 2 * kChunk * 4;
constexpr uint32_t kQuerySharedBytes = kQueryBarriers + 128 + 1024;

// The product of 8 values each of o and do.
__device__ __forceinline__ float dot8(uint4 a, uint4 b) {
    const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 u = unpack2<Bf16>(x[i]), v = unpack2<Bf16>(y[i]);
        sum = fmaf(u.x, v.x, fmaf(u.y, v.y, sum));
    }
    return sum;
}

// do . o of one token over all columns of v, by two threads: this one takes half of the 16-byte vectors. Both get the sum.
__device__ __forceinline__ float output_product(const BackwardParameters& p, const Piece& piece, uint32_t stage, int row,
                                                int half, int token) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t at = stage + row * 128 + (((4 * half + i) ^ (row & 7)) << 4);
        sum += dot8(load_shared_16(at + kQueryOut), load_shared_16(at + kQueryDout));
    }
    if (p.column_tiles > 1 && token < piece.end_token) {  // columns of the other tiles
        const Bf16* o = p.o + p.token_index(piece, token) * p.value_dim;
        const Bf16* dout = static_cast<const Bf16*>(p.dout.data) + piece.batch * p.dout.batch_stride +
                           token * p.dout.token_stride + piece.head * p.dout.head_stride;
        for (int column = 8 * half; column < p.value_dim; column += 16) {
            if (column / kColumns == piece.column_tile) continue;
            sum += dot8(__ldg(reinterpret_cast<const uint4*>(o + column)), __ldg(reinterpret_cast<const uint4*>(dout + column)));
        }
    }
    return sum + __shfl_xor_sync(~0u, sum, 1);
}

// ds of the chunk, over the scores q . k (in place), and this thread's parts of each row's denominator and of do times its
// numerator.
template <bool kMask>
__device__ __forceinline__ void query_score_gradients(float (&scores)[32], const float (&dP)[32], const float (&delta)[2],
                                                      float (&row_sum)[2], float (&numerator)[2], int warp, int lane,
                                                      uint2 counts) {
    const int t = lane & 3, before = 16 * warp + (lane >> 2) - 2 * t;  // row - first column
    row_sum[0] = row_sum[1] = numerator[0] = numerator[1] = 0.0f;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int column = 8 * n + (i & 1), upper = i >> 1;  // column relative to 2 t
            const float x = scores[4 * n + i];
            bool keep = column <= before + 8 * upper;
            if (kMask) keep = keep && ((((n < 4 ? counts.x : counts.y) >> (2 * t)) >> (column & 31)) & 1);
            const float weight = keep ? fmaf(x, fmaf(x, 0.03125f, 0.25f), 1.0f) : 0.0f;
            row_sum[upper] += weight;
            numerator[upper] = fmaf(weight, dP[4 * n + i], numerator[upper]);
            scores[4 * n + i] = keep ? (dP[4 * n + i] - delta[upper]) * fmaf(x, 0.0625f, 0.25f) : 0.0f;
        }
    }
}

template <bool kMask>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    backward_queries(const __grid_constant__ BackwardMaps maps, const __grid_constant__ BackwardParameters p) {
    const uint32_t memory = aligned_shared_memory();
    const uint32_t full = memory + kQueryBarriers;          // a stage's tiles have arrived
    const uint32_t published = full + 8 * kBackwardStages;  // the state side has completed a copy of the state
    const int block_warp = warp_uniform(threadIdx.x / 32);
    const int warp = block_warp % 4, side = block_warp / 4, lane = threadIdx.x % 32;
    const Piece piece(p);

    const auto load = [&](int chunk) {
        const int stage = chunk % kBackwardStages;
        const uint32_t tile = memory + stage * kQueryStageBytes, barrier = full + 8 * stage;
        const int token = piece.first_token + chunk * kChunk, column = piece.column_tile * kColumns;
        mbarrier_arrive_expect(barrier, kQueryStageBytes);
        copy_tile_in(tile + kQueryK, &maps.k, barrier, 0, piece.head, token, piece.batch);
        copy_tile_in(tile, &maps.v, barrier, column, piece.head, token, piece.batch);
        copy_tile_in(tile + kQueryDout, &maps.dout, barrier, column, piece.head, token, piece.batch);
        copy_tile_in(tile + kQueryOut, &maps.o, barrier, column, piece.head, token, piece.batch);
        copy_tile_in(tile + kQueryQ, &maps.q, barrier, 0, piece.head, token, piece.batch);
    };
    const auto wait_for_tiles = [&](int chunk) {
        mbarrier_wait_warp(full + 8 * (chunk % kBackwardStages), (chunk / kBackwardStages) & 1);
    };

    if (threadIdx.x == 0) {
        for (int i = 0; i < kBackwardStages; ++i) mbarrier_init(full + 8 * i, 1);
        for (int i = 0; i < 2; ++i) mbarrier_init(published + 8 * i, kWarpgroup);
        mbarrier_init_fence();
        for (int chunk = 0; chunk < min(kBackwardStages, piece.chunks); ++chunk) load(chunk);
    }
    __syncthreads();

    if (side < kTokenSides) {
        acquire_registers<kTokenRegisters>();
        ChunkMask<kMask> chunk_mask;
        chunk_mask.fetch(p, piece, side, lane);
        const uint32_t copy = memory + kQueryState + side * kPhiBytes;
        const uint32_t moments = memory + kQueryMoments + side * kMomentBytes;
        const uint32_t deltas = memory + kQueryDelta + side * kChunk * 4;
        const int g = lane >> 2, t = lane & 3;
        for (int chunk = side; chunk < piece.chunks; chunk += kTokenSides) {
            const uint2 counts = chunk_mask.take(p, piece, chunk + kTokenSides, lane);
            const uint32_t tiles = memory + chunk % kBackwardStages * kQueryStageBytes;
            const uint32_t dout = tiles + kQueryDout, q_tile = tiles + kQueryQ, k_tile = tiles + kQueryK;

            // Inside the chunk.
            float scores[32], dP[32];
            wait_for_tiles(chunk);
            wgmma_fence();
            wgmma_scores<Bf16>(scores, rows16(q_tile), rows16(k_tile), 0);
            start_token_products(dP, dout, tiles);
            wgmma_commit();
            mbarrier_wait_warp(published + 8 * side, (chunk / 2) & 1);
            float delta[2], row_sum[2], numerator[2];  // rows g and g + 8 of the warp's 16
#pragma unroll
            for (int upper = 0; upper < 2; ++upper) delta[upper] = load_shared_float(deltas + (16 * warp + g + 8 * upper) * 4);
            float own_delta[2];  // the terms with do . o are added by one column tile only
#pragma unroll
            for (int upper = 0; upper < 2; ++upper) own_delta[upper] = piece.column_tile == 0 ? delta[upper] : 0.0f;
            wgmma_wait<0>();
            query_score_gradients<kMask>(scores, dP, own_delta, row_sum, numerator, warp, lane, counts);
            uint32_t ds[4][4];
            pack_accumulators<Bf16>(ds, scores);

            // Through the state before the chunk.
            float first[40], rest[40];  // dphi
            wgmma_fence();
            start_feature_gradients<0>(first, dout, copy);
            start_feature_gradients<5>(rest, dout, copy);
            float low[4] = {}, high[4] = {};  // ds k
            multiply_rows<Bf16>(low, high, ds, k_tile, lane);
            RowMoments z;
            z.load<Bf16>(q_tile, moments, warp, lane);
            const float count = load_shared_float(moments + 1536);
            float y[2][12], dy[2][12];
#pragma unroll
            for (int upper = 0; upper < 2; ++upper) {
                load_rotated_row<Bf16>(y[upper], q_tile, 16 * warp + g + 8 * upper, t);
#pragma unroll
                for (int j = 0; j < 12; ++j) dy[upper][j] = 0.0f;
            }
            wgmma_wait<1>();
#pragma unroll
            for (int upper = 0; upper < 2; ++upper) add_row_gradient<0>(dy[upper], y[upper], first, upper, t);
            wgmma_wait<0>();
            if (chunk + 2 < piece.chunks) barrier_arrive<2 * kWarpgroup>(kRead + side);
#pragma unroll
            for (int upper = 0; upper < 2; ++upper) {
                add_row_gradient<5>(dy[upper], y[upper], rest, upper, t);
                numerator[upper] += add_first_order(dy[upper], y[upper], rest, upper, t);
            }

#pragma unroll
            for (int upper = 0; upper < 2; ++upper) {
                const float denominator = sum_of_row(row_sum[upper] + z.value<Bf16>(upper)) + count;
                const float w = p.normalize && denominator != 0.0f ? 1.0f / denominator : 1.0f;
                const float2 z_low = z.low_gradient(upper), z_high = z.high_gradient(upper);
                const float minus = -own_delta[upper];
                const float4 inside = gather_accumulators(
                    make_float2(fmaf(minus, z_low.x, low[2 * upper]), fmaf(minus, z_low.y, low[2 * upper + 1])),
                    make_float2(fmaf(minus, z_high.x, high[2 * upper]), fmaf(minus, z_high.y, high[2 * upper + 1])), lane);
                const float4 through = gather_row_gradient(dy[upper], lane);
                const int token = piece.first_token + chunk * kChunk + 16 * warp + g + 8 * upper;
                store_row_gradient(p, piece, token, t,
                                   make_float4(w * (inside.x + through.x), w * (inside.y + through.y),
                                               w * (inside.z + through.z), w * (inside.w + through.w)));
                const float exact_delta = w * sum_of_row(numerator[upper]);
                if (piece.column_tile == 0 && t == 0 && token < piece.end_token) {
                    const int64_t at = p.token_index(piece, token);
                    p.w[at] = w;
                    p.c[at] = p.normalize ? -(p.column_tiles == 1 ? exact_delta : delta[upper]) * w : 0.0f;
                }
            }
        }
    } else {
        release_registers<kStateRegisters>();
        RunningState state;
        state.warp = warp, state.lane = lane;
        ChunkMask<kMask> chunk_mask;
        chunk_mask.fetch(p, piece, 0, lane);
        const int thread = threadIdx.x % kWarpgroup;
        const uint32_t phi = memory + kQueryPhi;
        if (!kMask && warp >= 2) {
            write_constant_feature<Bf16>(phi, thread & 63);
            write_constant_feature<Bf16>(phi + kPhiBytes, thread & 63);
        }
        const auto k_tile = [&](int chunk) { return memory + chunk % kBackwardStages * kQueryStageBytes + kQueryK; };
        // phi(k) of a chunk, for the tensor cores once the state side has met.
        const auto write_features = [&](int chunk, uint2 counts) {
            const int row = thread & 63;
            const bool counted = ((row < 32 ? counts.x : counts.y) >> (row & 31)) & 1;
            write_key_features<Bf16, kMask>(phi + (chunk & 1) * kPhiBytes, k_tile(chunk), row, warp >> 1, counted);
            fence_async_proxy();
        };
        const auto delta_of = [&](int chunk) {  // by two threads a token
            if (!p.normalize) return 0.0f;
            const int row = thread >> 1, token = piece.first_token + chunk * kChunk + row;
            return output_product(p, piece, memory + chunk % kBackwardStages * kQueryStageBytes, row, thread & 1, token);
        };
        const auto publish = [&](int chunk, float delta) {
            const int slot = chunk & 1;
            if ((thread & 1) == 0) store_shared_float(memory + kQueryDelta + (slot * kChunk + (thread >> 1)) * 4, delta);
            state.publish(memory + kQueryState + slot * kPhiBytes, memory + kQueryMoments + slot * kMomentBytes,
                          published + 8 * slot);
        };
        state.read(p, piece, true, true);
        uint2 counts = chunk_mask.take(p, piece, 1, lane);
        wait_for_tiles(0);
        publish(0, delta_of(0));
        write_features(0, counts);
        for (int chunk = 0; chunk < piece.chunks - 1; ++chunk) {
            // Every warp has written its features of this chunk, and is done with those of the chunk before.
            barrier_wait<kWarpgroup>(kStateSide);
            const uint32_t v_tile = memory + chunk % kBackwardStages * kQueryStageBytes;
            start_state_update<Bf16>(state.sums, v_tile, phi + (chunk & 1) * kPhiBytes);
            const int tokens = kMask ? __popc(counts.x) + __popc(counts.y) : kChunk;
            state.moments.add_keys<kMask>(k_tile(chunk), warp, lane, counts, tokens);
            __syncwarp();
            counts = chunk_mask.take(p, piece, chunk + 2, lane);
            wait_for_tiles(chunk + 1);
            const float delta = delta_of(chunk + 1);
            write_features(chunk + 1, counts);
            wgmma_wait<0>();
            if (chunk > 0) {
                barrier_wait<2 * kWarpgroup>(kRead + ((chunk + 1) & 1));
                // Both sides are done with the chunk before this one, so its stage can be filled again.
                if (thread == 0 && chunk - 1 + kBackwardStages < piece.chunks) load(chunk - 1 + kBackwardStages);
                __syncwarp();
            }
            publish(chunk + 1, delta);
        }
    }
}

}  // namespace jrt
