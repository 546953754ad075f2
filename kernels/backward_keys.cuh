// dk and dv of a text, chunk by chunk backward in time, and the gradient of the state before the piece (backward.cuh). With
// s = q . k / 4 and P = 1 + s + s^2 / 2, inside a chunk
//
//   dP = w do v^T + c,  ds = dP (1 + s) / 4,  dk = ds^T q,  dv = (w P)^T do
//
// and through later queries dphi(k) = v R^T + r, dv += phi(k) R. Rows of the products are keys, columns are queries.
//
// A prefix has no queries of its own: every chunk is read through one gradient of the state, which does not change. So the state
// side publishes it once and then only fills stages again. Nothing holds a token side back to the pace of the other, so it says
// with an mbarrier of each stage that the stage is free. (A named barrier would count two arrivals of the faster side as a meeting
// of both, and the state side would then wait forever.)
#pragma once

#include "backward.cuh"
#include "query.cuh"

namespace jrt {

// Shared memory, from a 1024-byte boundary.
constexpr uint32_t kKeysDout = kValueTileBytes;  // within a stage, after v
constexpr uint32_t kKeysQ = 2 * kValueTileBytes;
constexpr uint32_t kKeysK = kKeysQ + kKeyTileBytes;
constexpr uint32_t kKeysStageBytes = kKeysK + kKeyTileBytes;
constexpr uint32_t kKeysOut = kBackwardStages * kKeysStageBytes;  // dv, a tile for each token side
constexpr uint32_t kKeysPhi = kKeysOut + kTokenSides * kValueTileBytes;
constexpr uint32_t kKeysState = kKeysPhi + 2 * kPhiBytes;
constexpr uint32_t kKeysMoments = kKeysState + 2 * kPhiBytes;
constexpr uint32_t kKeysWeights = kKeysMoments + 2 * kMomentBytes;  // w and c of two chunks
constexpr uint32_t kWeightBytes = 2 * kChunk * 4;
constexpr uint32_t kKeysBarriers = kKeysWeights + 2 * kWeightBytes;
constexpr uint32_t kKeysSharedBytes = kKeysBarriers + 128 + 1024;

// w P over the scores k . q (in place) and ds over dP (in place), from w and c in shared memory.
__device__ __forceinline__ void key_score_gradients(float (&scores)[32], float (&dP)[32], uint32_t weights, int warp, int lane) {
    const int t = lane & 3, before = 16 * warp + (lane >> 2) - 2 * t;  // row - first column
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        const uint2 w = load_shared_8(weights + (8 * n + 2 * t) * 4), c = load_shared_8(weights + (kChunk + 8 * n + 2 * t) * 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float own_w = __uint_as_float(i & 1 ? w.y : w.x), own_c = __uint_as_float(i & 1 ? c.y : c.x);
            const bool keep = 8 * n + (i & 1) >= before + 8 * (i >> 1);  // the query comes with the key or after it
            const float x = scores[4 * n + i];
            scores[4 * n + i] = keep ? fmaf(x, fmaf(x, 0.03125f, 0.25f), 1.0f) * own_w : 0.0f;
            dP[4 * n + i] = keep ? fmaf(dP[4 * n + i], own_w, own_c) * fmaf(x, 0.0625f, 0.25f) : 0.0f;
        }
    }
}

// kText: a text; otherwise a prefix.
template <bool kText, bool kMask>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    backward_keys(const __grid_constant__ BackwardMaps maps, const __grid_constant__ BackwardParameters p) {
    const uint32_t memory = aligned_shared_memory();
    const uint32_t full = memory + kKeysBarriers;           // a stage's tiles have arrived
    const uint32_t published = full + 8 * kBackwardStages;  // the state side has completed a copy of the gradient of the state
    const uint32_t free = published + 8 * kTokenSides;      // prefix: a token side is done with a stage
    const int block_warp = warp_uniform(threadIdx.x / 32);
    const int warp = block_warp % 4, side = block_warp / 4;
    int lane = threadIdx.x % 32;
    const Piece piece(p);

    // Steps count from the end.
    const auto first_token = [&](int step) { return piece.first_token + (piece.chunks - 1 - step) * kChunk; };
    const auto load = [&](int step) {
        const int stage = step % kBackwardStages;
        const uint32_t tile = memory + stage * kKeysStageBytes, barrier = full + 8 * stage;
        const int token = first_token(step), column = piece.column_tile * kColumns;
        mbarrier_arrive_expect(barrier, kText ? kKeysStageBytes : kKeyTileBytes + kValueTileBytes);
        if (kText) {
            copy_tile_in(tile + kKeysQ, &maps.q, barrier, 0, piece.head, token, piece.batch);
            copy_tile_in(tile + kKeysDout, &maps.dout, barrier, column, piece.head, token, piece.batch);
        }
        copy_tile_in(tile + kKeysK, &maps.k, barrier, 0, piece.head, token, piece.batch);
        copy_tile_in(tile, &maps.v, barrier, column, piece.head, token, piece.batch);
    };
    const auto wait_for_tiles = [&](int step) {
        mbarrier_wait_warp(full + 8 * (step % kBackwardStages), (step / kBackwardStages) & 1);
    };

    if (threadIdx.x == 0) {
        for (int i = 0; i < kBackwardStages; ++i) mbarrier_init(full + 8 * i, 1), mbarrier_init(free + 8 * i, kWarpgroup);
        for (int i = 0; i < kTokenSides; ++i) mbarrier_init(published + 8 * i, kWarpgroup);
        mbarrier_init_fence();
        for (int step = 0; step < min(kBackwardStages, piece.chunks); ++step) load(step);
    }
    __syncthreads();

    if (side < kTokenSides) {
        acquire_registers<kTokenRegisters>();
        const uint32_t copy = memory + kKeysState + side * kPhiBytes;
        const uint32_t moments = memory + kKeysMoments + side * kMomentBytes;
        const uint32_t weights = memory + kKeysWeights + side * kWeightBytes;
        const uint32_t out_tile = memory + kKeysOut + side * kValueTileBytes + warp * (kValueTileBytes / 4);
        for (int step = side; step < piece.chunks; step += kTokenSides) {
            forget_origin(lane);  // addresses are computed again rather than kept in registers that are not there
            const int g = lane >> 2, t = lane & 3;
            const uint32_t tiles = memory + step % kBackwardStages * kKeysStageBytes;
            const uint32_t dout = tiles + kKeysDout, q_tile = tiles + kKeysQ, k_tile = tiles + kKeysK;
            const int token = first_token(step) + 16 * warp + g;  // of row g
            bool counts[2] = {true, true};                        // is the key of row g, g + 8 no padding?
            if (kMask) {
                const uint8_t* row = p.mask + piece.batch * p.mask_batch_stride;
#pragma unroll
                for (int upper = 0; upper < 2; ++upper) {
                    counts[upper] = token + 8 * upper < piece.end_token && __ldg(row + token + 8 * upper) != 0;
                }
            }

            float dv[32];
            float low[4] = {}, high[4] = {};  // dk inside the chunk: ds^T q
            wait_for_tiles(step);
            if (kText) {
                float scores[32], dP[32];
                uint32_t wP[4][4], ds[4][4];
                wgmma_fence();
                wgmma_scores<Bf16>(scores, rows16(k_tile), rows16(q_tile), 0);
                start_token_products(dP, tiles, dout);
                wgmma_commit();
                mbarrier_wait_warp(published + 8 * side, (step / 2) & 1);
                wgmma_wait<0>();
                key_score_gradients(scores, dP, weights, warp, lane);
                pack_accumulators<Bf16>(wP, scores);
                pack_accumulators<Bf16>(ds, dP);
                wgmma_fence();
#pragma unroll
                for (int i = 0; i < 4; ++i) wgmma_values<Bf16>(dv, wP[i], value_descriptor(dout, i), i > 0);
                wgmma_commit();
                multiply_rows<Bf16>(low, high, ds, q_tile, lane);
            } else {
                mbarrier_wait_warp(published + 8 * side, 0);
            }

            // dv through later queries, in two halves as in the forward pass.
            uint32_t features[kSlabs / 2][4], rest_features[kSlabs / 2][4];
            build_query_features<Bf16, 0>(features, k_tile, warp, lane);
            wgmma_fence();
            const auto state_slab = [&](int slab) { return matrix_descriptor(copy, slab * kSlabBytes, 16, 256, Swizzle::k32); };
#pragma unroll
            for (int i = 0; i < kSlabs / 2; ++i) wgmma_state_read<Bf16>(dv, features[i], state_slab(i), kText || i > 0);
            wgmma_commit();
            build_query_features<Bf16, kSlabs / 2>(rest_features, k_tile, warp, lane);
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < kSlabs / 2; ++i) wgmma_state_read<Bf16>(dv, rest_features[i], state_slab(kSlabs / 2 + i), 1);
            wgmma_commit();

            // dk through later queries.
            float first[40], rest[40];  // dphi
            start_feature_gradients<0>(first, tiles, copy);
            if (lane == 0) copy_out_wait_read();
            __syncwarp();
            wgmma_wait<1>();
#pragma unroll
            for (int i = 0; i < 32; ++i) dv[i] = counts[(i >> 1) & 1] ? dv[i] : 0.0f;
            const float one[2] = {1.0f, 1.0f};
            stage_outputs<Bf16>(dv, one, out_tile, lane);
            fence_async_proxy();
            __syncwarp();
            if (lane == 0 && token < p.tokens) {  // lane 0 has the warp's first token
                copy_tile_out(&maps.dv, out_tile, piece.column_tile * kColumns, piece.head, token, piece.batch);
                copy_out_commit();
            }
            __syncwarp();
            wgmma_fence();
            start_feature_gradients<5>(rest, tiles, copy);
            RowMoments r;
            r.load<Bf16>(k_tile, moments, warp, lane);
            float y[2][12], dy[2][12];
#pragma unroll
            for (int upper = 0; upper < 2; ++upper) {
                load_rotated_row<Bf16>(y[upper], k_tile, 16 * warp + g + 8 * upper, t);
#pragma unroll
                for (int j = 0; j < 12; ++j) dy[upper][j] = 0.0f;
            }
            wgmma_wait<1>();
#pragma unroll
            for (int upper = 0; upper < 2; ++upper) add_row_gradient<0>(dy[upper], y[upper], first, upper, t);
            wgmma_wait<0>();
            if (!kText) {
                mbarrier_arrive(free + 8 * (step % kBackwardStages));
            } else if (step + 2 < piece.chunks) {
                barrier_arrive<2 * kWarpgroup>(kRead + side);
            }
#pragma unroll
            for (int upper = 0; upper < 2; ++upper) {
                add_row_gradient<5>(dy[upper], y[upper], rest, upper, t);
                add_first_order(dy[upper], y[upper], rest, upper, t);
            }
#pragma unroll
            for (int upper = 0; upper < 2; ++upper) {
                const float2 r_low = r.low_gradient(upper), r_high = r.high_gradient(upper);
                const float4 inside = gather_accumulators(make_float2(low[2 * upper] + r_low.x, low[2 * upper + 1] + r_low.y),
                                                          make_float2(high[2 * upper] + r_high.x, high[2 * upper + 1] + r_high.y),
                                                          lane);
                const float4 through = gather_row_gradient(dy[upper], lane);
                const float keep = counts[upper] ? 1.0f : 0.0f;
                store_row_gradient(p, piece, token + 8 * upper, t,
                                   make_float4(keep * (inside.x + through.x), keep * (inside.y + through.y),
                                               keep * (inside.z + through.z), keep * (inside.w + through.w)));
            }
        }
        if (lane == 0) copy_out_wait();
    } else {
        release_registers<kStateRegisters>();
        RunningState state;
        state.warp = warp, state.lane = lane;
        const int thread = threadIdx.x % kWarpgroup;
        const uint32_t phi = memory + kKeysPhi;
        // The terms with c and r are added by one column tile only.
        state.read(p, piece, kText, piece.column_tile == 0);

        float w = 0.0f, c = 0.0f;  // of token `row` of the step whose features are written next
        const int row = thread & 63;
        const auto fetch_weights = [&](int step) {
            const int token = first_token(step) + row;
            const bool has = kText && step < piece.chunks && token < piece.end_token;
            const int64_t at = has ? p.token_index(piece, token) : 0;
            w = has ? p.w[at] : 0.0f;
            c = has && piece.column_tile == 0 ? p.c[at] : 0.0f;
        };
        const auto q_tile = [&](int step) { return memory + step % kBackwardStages * kKeysStageBytes + kKeysQ; };
        const auto weights_of = [&](int step) { return memory + kKeysWeights + (step & 1) * kWeightBytes; };
        const auto publish = [&](int step) {
            const int slot = step & 1;
            if (kText) store_shared_float(weights_of(step) + thread * 4, thread < kChunk ? w : c);
            state.publish(memory + kKeysState + slot * kPhiBytes, memory + kKeysMoments + slot * kMomentBytes,
                          published + 8 * slot);
        };
        const auto take_back_stage = [&](int step) {
            barrier_wait<2 * kWarpgroup>(kRead + ((step + 1) & 1));
            // Both sides are done with the step before this one, so its stage can be filled again.
            if (thread == 0 && step - 1 + kBackwardStages < piece.chunks) load(step - 1 + kBackwardStages);
            __syncwarp();
        };
        fetch_weights(0);
        publish(0);
        if (!kText) {
            publish(1);
            for (int step = kBackwardStages; thread == 0 && step < piece.chunks; ++step) {
                mbarrier_wait(free + 8 * (step % kBackwardStages), (step / kBackwardStages - 1) & 1);
                load(step);
            }
            return;
        }
        // w phi(q) of a chunk, for the tensor cores once the state side has met.
        const auto write_features = [&](int step) {
            wait_for_tiles(step);
            write_key_features<Bf16, false, true>(phi + (step & 1) * kPhiBytes, q_tile(step), row, warp >> 1, true, w);
            fence_async_proxy();
        };
        write_features(0);
        fetch_weights(1);
        const bool to_start = piece.piece == 0;  // the first piece goes on to the gradient of the initial state
        const int steps = to_start ? piece.chunks : piece.chunks - 1;
        for (int step = 0; step < steps; ++step) {
            forget_origin(state.lane);
            // Every warp has written its features and weights of this step, and is done with those of the step before.
            barrier_wait<kWarpgroup>(kStateSide);
            const uint32_t dout = memory + step % kBackwardStages * kKeysStageBytes + kKeysDout;
            start_state_update<Bf16>(state.sums, dout, phi + (step & 1) * kPhiBytes);
            state.moments.add_queries(q_tile(step), weights_of(step) + kChunk * 4, warp, state.lane);
            __syncwarp();
            const int next = step + 1;
            if (next < piece.chunks) write_features(next);
            wgmma_wait<0>();
            if (next < piece.chunks) {
                if (step > 0) take_back_stage(step);
                publish(next);
                fetch_weights(next + 1);
            }
        }
        if (to_start) state.write(p, piece, piece.state(p));
    }
}

}  // namespace jrt
