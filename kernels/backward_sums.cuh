// What each piece of a text adds to the state, or to its gradient, as if nothing stood before or after it (backward.cuh): sums
// of phi(k) v^T and phi(k) over the keys, or of phi(q) (w do)^T and c phi(q) over the queries. One warpgroup, as in
// prefill_state; it builds the features of the next chunk while the tensor cores add those of this one.
#pragma once

#include "backward.cuh"

namespace jrt {

// Shared memory, from a 1024-byte boundary.
constexpr int kSumStages = 3;
constexpr uint32_t kSumStageBytes = kValueTileBytes + kKeyTileBytes;  // v or do, then k or q
constexpr uint32_t kSumPhi = kSumStages * kSumStageBytes;
constexpr uint32_t kSumWeights = kSumPhi + 2 * kPhiBytes;  // c of two chunks
constexpr uint32_t kSumBarriers = kSumWeights + 2 * kChunk * 4;
constexpr uint32_t kSumSharedBytes = kSumBarriers + 128 + 1024;

template <bool kQueries, bool kMask>
__global__ void __launch_bounds__(kWarpgroup, 3)
    backward_sums(const __grid_constant__ BackwardMaps maps, const __grid_constant__ BackwardParameters p) {
    const Piece piece(p);
    if (piece.piece == (kQueries ? 0 : p.pieces - 1)) return;  // no other piece depends on this one
    const uint32_t memory = aligned_shared_memory();
    const uint32_t full = memory + kSumBarriers;
    const uint32_t phi = memory + kSumPhi;
    RunningState state;
    state.warp = warp_uniform(threadIdx.x / 32), state.lane = threadIdx.x % 32;
    state.clear();

    const auto load = [&](int chunk) {
        const int stage = chunk % kSumStages;
        const uint32_t tile = memory + stage * kSumStageBytes, barrier = full + 8 * stage;
        const int token = piece.first_token + chunk * kChunk, column = piece.column_tile * kColumns;
        mbarrier_arrive_expect(barrier, kSumStageBytes);
        copy_tile_in(tile + kValueTileBytes, kQueries ? &maps.q : &maps.k, barrier, 0, piece.head, token, piece.batch);
        copy_tile_in(tile, kQueries ? &maps.dout : &maps.v, barrier, column, piece.head, token, piece.batch);
    };
    if (threadIdx.x == 0) {
        for (int i = 0; i < kSumStages; ++i) mbarrier_init(full + 8 * i, 1);
        mbarrier_init_fence();
        for (int chunk = 0; chunk < min(kSumStages, piece.chunks); ++chunk) load(chunk);
    }
    const int row = threadIdx.x & 63;
    if (!kQueries && !kMask && state.warp >= 2) {
        write_constant_feature<Bf16>(phi, row);
        write_constant_feature<Bf16>(phi + kPhiBytes, row);
    }
    __syncthreads();

    ChunkMask<kMask> chunk_mask;
    chunk_mask.fetch(p, piece, 0, state.lane);
    float w = 0.0f, c = 0.0f;  // of token `row` of the next chunk
    const auto fetch_weights = [&](int chunk) {
        const int token = piece.first_token + chunk * kChunk + row;
        if (!kQueries || token >= piece.end_token) {
            w = c = 0.0f;
        } else {
            const int64_t at = p.token_index(piece, token);
            w = p.w[at], c = p.c[at];
        }
    };
    // phi of a chunk, for the tensor cores once the warpgroup has met at the barrier; and its weights for the moments.
    const auto write_features = [&](int chunk, uint2 counts) {
        const uint32_t tile = memory + chunk % kSumStages * kSumStageBytes + kValueTileBytes;
        const uint32_t features = phi + (chunk & 1) * kPhiBytes;
        mbarrier_wait_warp(full + 8 * (chunk % kSumStages), (chunk / kSumStages) & 1);
        if (kQueries) {
            write_key_features<Bf16, false, true>(features, tile, row, state.warp >> 1, true, w);
            if (threadIdx.x < kChunk) store_shared_float(memory + kSumWeights + ((chunk & 1) * kChunk + row) * 4, c);
            fetch_weights(chunk + 1);
        } else {
            const bool counted = ((row < 32 ? counts.x : counts.y) >> (row & 31)) & 1;
            write_key_features<Bf16, kMask>(features, tile, row, state.warp >> 1, counted);
        }
        fence_async_proxy();
    };
    fetch_weights(0);
    uint2 counts = chunk_mask.take(p, piece, 1, state.lane);
    write_features(0, counts);
    for (int chunk = 0; chunk < piece.chunks; ++chunk) {
        // Every warp is done with the chunk before and has written its features of this one.
        barrier_wait<kWarpgroup>(kStateSide);
        if (threadIdx.x == 0 && chunk > 0 && chunk + kSumStages - 1 < piece.chunks) load(chunk + kSumStages - 1);
        __syncwarp();
        const uint32_t tile = memory + chunk % kSumStages * kSumStageBytes;
        const uint32_t weights = memory + kSumWeights + (chunk & 1) * kChunk * 4;
        start_state_update<Bf16>(state.sums, tile, phi + (chunk & 1) * kPhiBytes);
        if (kQueries) {
            state.moments.add_queries(tile + kValueTileBytes, weights, state.warp, state.lane);
        } else {
            const int tokens = kMask ? __popc(counts.x) + __popc(counts.y) : piece.tokens_of(chunk);
            state.moments.add_keys<kMask>(tile + kValueTileBytes, state.warp, state.lane, counts, tokens);
        }
        __syncwarp();
        if (chunk + 1 < piece.chunks) {
            counts = chunk_mask.take(p, piece, chunk + 2, state.lane);
            write_features(chunk + 1, counts);
        }
        wgmma_wait<0>();
    }
    state.write(p, piece, p.piece_index(piece));
}

}  // namespace jrt
