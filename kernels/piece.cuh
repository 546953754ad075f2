// What a block works on: its piece of a sequence, and which tokens of a chunk count. For the forward and backward kernels:
// `Parameters` has the sizes (tokens, heads, value_dim, column_tiles, pieces, piece_chunks) and the mask.
#pragma once

#include "state.cuh"

namespace jrt {

// Which part of the work a block does.
struct Piece {
    int column_tile, head, piece, batch;
    int first_token, end_token, chunks;
    int columns;  // of v that exist in this tile

    template <typename Parameters>
    __device__ __forceinline__ Piece(const Parameters& p) {
        int rest = blockIdx.x;
        column_tile = rest % p.column_tiles, rest /= p.column_tiles;
        head = rest % p.heads, rest /= p.heads;
        piece = rest % p.pieces;
        batch = rest / p.pieces;
        first_token = piece * p.piece_chunks * kChunk;
        end_token = min(p.tokens, first_token + p.piece_chunks * kChunk);
        chunks = (end_token - first_token + kChunk - 1) / kChunk;
        columns = min(kColumns, p.value_dim - column_tile * kColumns);
    }
    template <typename Parameters>
    __device__ __forceinline__ int64_t state(const Parameters& p) const {
        return static_cast<int64_t>(batch) * p.heads + head;
    }
    __device__ __forceinline__ int tokens_of(int chunk) const {
        return min(kChunk, end_token - first_token - chunk * kChunk);
    }
    template <typename Parameters>
    __device__ __forceinline__ bool writes_state(const Parameters& p) const {
        return !p.last_piece_only || piece == p.pieces - 1;
    }
};

// Which tokens of a chunk count, one bit each, fetched before the chunk is needed. Without a mask: all.
template <bool kMask>
struct ChunkMask {
    uint32_t bytes = 0;  // of tokens `lane` and `lane` + 32 of the chunk fetched last

    template <typename Parameters>
    __device__ __forceinline__ void fetch(const Parameters& p, const Piece& piece, int chunk, int lane) {
        if (!kMask) return;
        const uint8_t* row = p.mask + piece.batch * p.mask_batch_stride;
        const int token = piece.first_token + chunk * kChunk + lane;
        bytes = token < piece.end_token ? __ldg(row + token) : 0;
        bytes |= token + 32 < piece.end_token ? __ldg(row + token + 32) << 8 : 0;
    }
    // Bits of tokens 0..31 (x) and 32..63 (y) of the chunk fetched last; fetches `next`.
    template <typename Parameters>
    __device__ __forceinline__ uint2 take(const Parameters& p, const Piece& piece, int next, int lane) {
        if (!kMask) return make_uint2(~0u, ~0u);
        const uint2 bits = make_uint2(__ballot_sync(~0u, bytes & 0xff), __ballot_sync(~0u, bytes >> 8));
        fetch(p, piece, next, lane);
        return bits;
    }
};

__device__ __forceinline__ uint32_t aligned_shared_memory() {
    extern __shared__ uint8_t memory[];
    return (shared_address(memory) + 1023) & ~1023u;
}

}  // namespace jrt
