// Prefill for d = 16 on Hopper. A block handles one head (or one piece of its sequence) and 64 columns of v.
//
//   prefill_text   two warpgroups: threads 0..127 answer queries (query.cuh), threads 128..255 keep the state (state.cuh).
//                  They meet once a chunk, over a double-buffered 16-bit copy of the state in shared memory.
//   prefill_state  one warpgroup, state only: a prefix, or the first pass over a sequence that is cut into pieces.
//
// A text in pieces takes three passes: the state after each piece but the last, as if nothing stood before it; their sums
// (scan.h), where there is more than one; the texts of all pieces at once. A prefix takes the first two, over all pieces.
//
// All sums run in one fixed order: equal inputs give equal bits.
#pragma once

#include "launch.h"
#include "piece.cuh"
#include "query.cuh"

namespace jrt {

struct PrefillMaps {
    CUtensorMap q, k, v, o;
};

struct PrefillParameters {
    const uint8_t* mask;
    int mask_batch_stride;
    const float* initial_S;  // (B, H, 153, D) before the first piece, or nullptr: zero
    const float* initial_z;
    const float* before_S;  // (pieces - 1, B, H, 153, D) before the others, or nullptr: zero
    const float* before_z;
    float* S;  // where the state after each piece goes
    float* z;
    int64_t states;        // B * H
    int64_t piece_stride;  // between pieces at S and z, in states
    int tokens, heads, value_dim, column_tiles;
    int pieces, piece_chunks;  // chunks of kChunk tokens in a piece
    int last_piece_only;       // only the last piece writes its state
    int normalize;
};

// Named barriers.
constexpr int kKeySide = 1;  // the key side meets
constexpr int kTaken = 2;    // and 3, one per copy of the state: the query side is done with it, the key side waits

constexpr uint32_t kStateCopyBytes = kPhiBytes;
constexpr uint32_t kOutBytes = kChunk * kColumns * 2;

// Shared memory of prefill_text, from a 1024-byte boundary.
constexpr int kTextStages = 3;
constexpr uint32_t kTextStageBytes = kValueTileBytes + 2 * kKeyTileBytes;  // v, k, q
constexpr uint32_t kTextOut = kTextStages * kTextStageBytes;
constexpr uint32_t kTextPhi = kTextOut + kOutBytes;
constexpr uint32_t kTextState = kTextPhi + kPhiBytes;
constexpr uint32_t kTextMoments = kTextState + 2 * kStateCopyBytes;
constexpr uint32_t kTextBarriers = kTextMoments + 2 * kMomentBytes;
constexpr uint32_t kTextSharedBytes = kTextBarriers + 128 + 1024;

// Shared memory of prefill_state.
constexpr int kStateStages = 3;
constexpr uint32_t kStateStageBytes = kValueTileBytes + kKeyTileBytes;  // v, k
constexpr uint32_t kStatePhi = kStateStages * kStateStageBytes;
constexpr uint32_t kStateBarriers = kStatePhi + 2 * kPhiBytes;
constexpr uint32_t kStateSharedBytes = kStateBarriers + 128 + 1024;

// The running state of one piece, in the registers of a warpgroup.
template <typename Elem, bool kMask>
struct KeySide {
    float sums[80];
    float moments[8];
    float count;
    int warp, lane;

    __device__ __forceinline__ void read(const PrefillParameters& p, const Piece& piece) {
        const bool first = piece.piece == 0;
        const int64_t state = piece.state(p) + (first ? 0 : (piece.piece - 1) * p.states);
        const float* S = first ? p.initial_S : p.before_S;
        const float* z = first ? p.initial_z : p.before_z;
        if (S != nullptr) {
            S += state * kFeatures * p.value_dim + piece.column_tile * kColumns;
            z += state * kFeatures;
        }
        read_state(sums, S, piece.columns, p.value_dim, warp, lane);
        count = read_moments(moments, z, warp, lane);
    }
    __device__ __forceinline__ void write(const PrefillParameters& p, const Piece& piece) const {
        const int64_t state = piece.state(p) + piece.piece * p.piece_stride;
        float* S = p.S + state * kFeatures * p.value_dim + piece.column_tile * kColumns;
        write_state(sums, S, piece.columns, p.value_dim, warp, lane);
        if (piece.column_tile == 0) write_moments(moments, count, p.z + state * kFeatures, warp, lane);
    }
    // phi(k) of a chunk, for the tensor cores once the warpgroup has met at the barrier.
    __device__ __forceinline__ void write_features(uint32_t k_tile, uint32_t phi, uint2 counts) const {
        const int thread = 32 * warp + lane, token = thread & 63;
        const bool token_counts = ((token < 32 ? counts.x : counts.y) >> (token & 31)) & 1;
        write_key_features<Elem, kMask>(phi, k_tile, token, warp >> 1, token_counts);
        fence_async_proxy();
    }
    // Starts the sums of a chunk on the tensor cores and adds its moments meanwhile.
    __device__ __forceinline__ void start(uint32_t k_tile, uint32_t v_tile, uint32_t phi, uint2 counts, int tokens) {
        start_state_update<Elem>(sums, v_tile, phi);
        if (warp < 2) add_moments<Elem, kMask>(moments, k_tile, warp, lane, counts);
        count += kMask ? __popc(counts.x) + __popc(counts.y) : tokens;
        __syncwarp();
    }
};

template <typename Elem, bool kMask>
__global__ void __launch_bounds__(2 * kWarpgroup, 2)
    prefill_text(const __grid_constant__ PrefillMaps maps, const __grid_constant__ PrefillParameters p) {
    const uint32_t memory = aligned_shared_memory();
    const uint32_t full = memory + kTextBarriers;  // a stage's tiles have arrived
    const uint32_t read = full + 8 * kTextStages;  // the query side is done with a stage
    const uint32_t published = read + 8 * kTextStages;  // the key side has completed a copy of the state
    const int block_warp = warp_uniform(threadIdx.x / 32);
    const int warp = block_warp % 4;
    int lane = threadIdx.x % 32;
    const bool query_side = block_warp < 4;
    const Piece piece(p);

    const auto load = [&](int chunk) {
        const int stage = chunk % kTextStages;
        const uint32_t tile = memory + stage * kTextStageBytes, barrier = full + 8 * stage;
        const int token = piece.first_token + chunk * kChunk;
        mbarrier_arrive_expect(barrier, kTextStageBytes);
        copy_tile_in(tile + kValueTileBytes, &maps.k, barrier, 0, piece.head, token, piece.batch);
        copy_tile_in(tile + kValueTileBytes + kKeyTileBytes, &maps.q, barrier, 0, piece.head, token, piece.batch);
        copy_tile_in(tile, &maps.v, barrier, piece.column_tile * kColumns, piece.head, token, piece.batch);
    };

    if (threadIdx.x == 0) {
        prefetch_tensor_map(&maps.q), prefetch_tensor_map(&maps.k);
        prefetch_tensor_map(&maps.v), prefetch_tensor_map(&maps.o);
        for (int i = 0; i < kTextStages; ++i) mbarrier_init(full + 8 * i, 1), mbarrier_init(read + 8 * i, 4);
        // Every thread arrives: the race checker orders an arrival after what its own thread did, not its warp.
        for (int i = 0; i < 2; ++i) mbarrier_init(published + 8 * i, kWarpgroup);
        mbarrier_init_fence();
        for (int chunk = 0; chunk < min(kTextStages, piece.chunks); ++chunk) load(chunk);
    }
    __syncthreads();

    if (query_side) {
        if (kMask) release_registers<120>();  // a mask costs the key side a few more than it has
        ChunkMask<kMask> chunk_mask;
        chunk_mask.fetch(p, piece, 0, lane);
        const uint32_t out_tile = memory + kTextOut + warp * (kOutBytes / 4);
        const auto start_scores = [&](float(&scores)[32], int chunk) {
            const int stage = chunk % kTextStages;
            const uint32_t k_tile = memory + stage * kTextStageBytes + kValueTileBytes, q_tile = k_tile + kKeyTileBytes;
            if (chunk < piece.chunks) mbarrier_wait_warp(full + 8 * stage, (chunk / kTextStages) & 1);
            wgmma_fence();
            wgmma_scores<Elem>(scores, matrix_descriptor(q_tile, 0, 16, 256, Swizzle::k32),
                               matrix_descriptor(k_tile, 0, 16, 256, Swizzle::k32), 0);
            wgmma_commit();
        };
        float scores[32];
        start_scores(scores, 0);
        for (int chunk = 0; chunk < piece.chunks; ++chunk) {
            if (kMask) forget_origin(lane);
            const uint2 counts = chunk_mask.take(p, piece, chunk + 1, lane);
            const int stage = chunk % kTextStages;
            const uint32_t v_tile = memory + stage * kTextStageBytes;
            const uint32_t q_tile = v_tile + kValueTileBytes + kKeyTileBytes;
            const uint32_t copy = memory + kTextState + (chunk & 1) * kStateCopyBytes;
            const uint32_t moments = memory + kTextMoments + (chunk & 1) * kMomentBytes;
            float o[32], row_sum[2], denominator[2];
            uint32_t features[kSlabs / 2][4], rest[kSlabs / 2][4], weights[4][4];

            // P V. The scores were started a chunk ago.
            if (!kMask) build_query_features<Elem, 0>(features, q_tile, warp, lane);
            wgmma_wait<0>();
            taylor_scores<Elem, kMask>(scores, weights, row_sum, causal_bits(warp, lane), lane, counts);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < kChunk / 16; ++step) {
                wgmma_values<Elem>(o, weights[step], value_descriptor(v_tile, step), step > 0);
            }
            wgmma_commit();

            // phi(q) S on top, in two halves: all of phi(q) beside the weights would not fit the registers (and with a mask,
            // half of it beside the scores would not either).
            mbarrier_wait_warp(published + 8 * (chunk & 1), (chunk / 2) & 1);
            denominators<Elem>(denominator, row_sum, q_tile, moments, warp, lane);
            if (kMask) build_query_features<Elem, 0>(features, q_tile, warp, lane);
            wgmma_fence();
            const auto state_slab = [&](int slab) {
                return matrix_descriptor(copy, slab * kSlabBytes, 16, 256, Swizzle::k32);
            };
#pragma unroll
            for (int i = 0; i < kSlabs / 2; ++i) {
                wgmma_state_read<Elem>(o, features[i], state_slab(i), 1);
            }
            wgmma_commit();
            wgmma_wait<1>();
            build_query_features<Elem, kSlabs / 2>(rest, q_tile, warp, lane);
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < kSlabs / 2; ++i) {
                wgmma_state_read<Elem>(o, rest[i], state_slab(kSlabs / 2 + i), 1);
            }
            wgmma_commit();

            // The state before this chunk is published, so the key side has left the chunk before it; `read` says when
            // this side has.
            if (warp == 0 && chunk > 0 && chunk + kTextStages - 1 < piece.chunks) {
                if (lane == 0) {
                    mbarrier_wait(read + 8 * ((chunk - 1) % kTextStages), ((chunk - 1) / kTextStages) & 1);
                    load(chunk + kTextStages - 1);
                }
                __syncwarp();
            }
            if (lane == 0) copy_out_wait_read();
            __syncwarp();
            wgmma_wait<0>();
            if (chunk + 2 < piece.chunks) barrier_arrive<2 * kWarpgroup>(kTaken + (chunk & 1));
            if (lane == 0) mbarrier_arrive(read + 8 * stage);
            __syncwarp();
            start_scores(scores, chunk + 1);  // after the last chunk: of whatever the stage holds, read by nobody

            float factor[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                // A padded query with nothing before it gives 0, not 0 / 0.
                const float inverse = reciprocal(denominator[i]);
                factor[i] = (p.normalize && denominator[i] != 0.0f ? inverse : 1.0f) / kRangeScale<Elem>;
            }
            stage_outputs<Elem>(o, factor, out_tile, lane);
            fence_async_proxy();
            __syncwarp();
            const int token = piece.first_token + chunk * kChunk + 16 * warp;
            if (lane == 0 && token < p.tokens) {
                copy_tile_out(&maps.o, out_tile, piece.column_tile * kColumns, piece.head, token, piece.batch);
                copy_out_commit();
            }
            __syncwarp();
        }
        wgmma_wait<0>();
        if (lane == 0) copy_out_wait();
    } else {
        if (kMask) acquire_registers<136>();
        KeySide<Elem, kMask> keys;
        keys.warp = warp, keys.lane = lane;
        ChunkMask<kMask> chunk_mask;
        chunk_mask.fetch(p, piece, 0, lane);
        const uint32_t phi = memory + kTextPhi;
        if (!kMask && warp >= 2) write_constant_feature<Elem>(phi, threadIdx.x & 63);
        keys.read(p, piece);

        const auto publish = [&](int chunk) {
            publish_state<Elem>(keys.sums, memory + kTextState + (chunk & 1) * kStateCopyBytes, warp, lane);
            publish_moments<Elem>(keys.moments, keys.count, memory + kTextMoments + (chunk & 1) * kMomentBytes, warp, lane);
            fence_async_proxy();
            mbarrier_arrive(published + 8 * (chunk & 1));
        };
        publish(0);
        const int chunks = piece.writes_state(p) ? piece.chunks : piece.chunks - 1;
        for (int chunk = 0; chunk < chunks; ++chunk) {
            forget_origin(keys.lane);  // addresses are computed again rather than kept in registers that are not there
            const uint2 counts = chunk_mask.take(p, piece, chunk + 1, lane);
            const int stage = chunk % kTextStages;
            const uint32_t v_tile = memory + stage * kTextStageBytes;
            mbarrier_wait_warp(full + 8 * stage, (chunk / kTextStages) & 1);
            keys.write_features(v_tile + kValueTileBytes, phi, counts);
            barrier_wait<kWarpgroup>(kKeySide);
            keys.start(v_tile + kValueTileBytes, v_tile, phi, counts, piece.tokens_of(chunk));
            wgmma_wait<0>();
            const int next = chunk + 1;
            if (next < piece.chunks) {
                if (next >= 2) barrier_wait<2 * kWarpgroup>(kTaken + (next & 1));
                publish(next);
            }
            barrier_wait<kWarpgroup>(kKeySide);  // phi may be overwritten
        }
        if (piece.writes_state(p)) keys.write(p, piece);
    }
}

template <typename Elem, bool kMask>
__global__ void __launch_bounds__(kWarpgroup, 3)
    prefill_state(const __grid_constant__ PrefillMaps maps, const __grid_constant__ PrefillParameters p) {
    const uint32_t memory = aligned_shared_memory();
    const uint32_t full = memory + kStateBarriers;
    const Piece piece(p);
    KeySide<Elem, kMask> keys;
    keys.warp = warp_uniform(threadIdx.x / 32), keys.lane = threadIdx.x % 32;

    const auto load = [&](int chunk) {
        const int stage = chunk % kStateStages;
        const uint32_t tile = memory + stage * kStateStageBytes, barrier = full + 8 * stage;
        const int token = piece.first_token + chunk * kChunk;
        mbarrier_arrive_expect(barrier, kStateStageBytes);
        copy_tile_in(tile + kValueTileBytes, &maps.k, barrier, 0, piece.head, token, piece.batch);
        copy_tile_in(tile, &maps.v, barrier, piece.column_tile * kColumns, piece.head, token, piece.batch);
    };
    if (threadIdx.x == 0) {
        prefetch_tensor_map(&maps.k), prefetch_tensor_map(&maps.v);
        for (int i = 0; i < kStateStages; ++i) mbarrier_init(full + 8 * i, 1);
        mbarrier_init_fence();
        for (int chunk = 0; chunk < min(kStateStages, piece.chunks); ++chunk) load(chunk);
    }
    const uint32_t phi = memory + kStatePhi;  // two buffers: phi(k) of the next chunk is built while the sums of one run
    if (!kMask && keys.warp >= 2) {
        write_constant_feature<Elem>(phi, threadIdx.x & 63);
        write_constant_feature<Elem>(phi + kPhiBytes, threadIdx.x & 63);
    }
    __syncthreads();

    ChunkMask<kMask> chunk_mask;
    chunk_mask.fetch(p, piece, 0, keys.lane);
    keys.read(p, piece);
    uint2 counts = chunk_mask.take(p, piece, 1, keys.lane);
    mbarrier_wait_warp(full, 0);
    keys.write_features(memory + kValueTileBytes, phi, counts);
    for (int chunk = 0; chunk < piece.chunks; ++chunk) {
        // Every warp is done with the chunk before and has written its features of this one.
        barrier_wait<kWarpgroup>(kKeySide);
        if (threadIdx.x == 0 && chunk > 0 && chunk + kStateStages - 1 < piece.chunks) load(chunk + kStateStages - 1);
        __syncwarp();
        const uint32_t v_tile = memory + chunk % kStateStages * kStateStageBytes;
        keys.start(v_tile + kValueTileBytes, v_tile, phi + (chunk & 1) * kPhiBytes, counts, piece.tokens_of(chunk));
        const int next = chunk + 1;
        if (next < piece.chunks) {
            counts = chunk_mask.take(p, piece, next + 1, keys.lane);
            mbarrier_wait_warp(full + 8 * (next % kStateStages), (next / kStateStages) & 1);
            const uint32_t next_k = memory + next % kStateStages * kStateStageBytes + kValueTileBytes;
            keys.write_features(next_k, phi + (next & 1) * kPhiBytes, counts);
        }
        wgmma_wait<0>();
    }
    keys.write(p, piece);
}

}  // namespace jrt
