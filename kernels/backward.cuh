// What the backward kernels share (bf16, d = 16). With den the denominator of a token, w = 1 / den and
// c = -(do . o) / den, the gradient of the numerator is w do and that of the denominator is c.
//
//   backward_queries  forward in time, over the state S, z of the keys before a chunk:     dq, w and c
//   backward_keys     backward in time, over its gradient R, r: sums of phi(q) (w do)^T and of c phi(q) over later queries:
//                     dk, dv, and the gradient of the initial state
//   backward_sums     what each piece of a text adds to either, where it is cut into pieces
//
// A block handles one head (or one piece of its sequence) and 64 columns of v. In the first two kernels it has three
// warpgroups. One, the state side, keeps the state in its registers and publishes a 16-bit copy of it before each chunk. The
// other two, the token sides, compute the gradients of the chunks, every other chunk each. With several column tiles, dq and dk
// are parts in fp32, one for each tile.
//
// All sums run in one fixed order: equal inputs give equal bits.
#pragma once

#include "gradient.cuh"
#include "launch.h"
#include "moments.cuh"
#include "piece.cuh"

namespace jrt {

using Bf16 = __nv_bfloat16;

struct BackwardMaps {
    CUtensorMap q, k, v, o, dout, dv;
};

struct BackwardParameters {
    const uint8_t* mask;
    int mask_batch_stride;
    // (B, pieces, H, 153, D) and (B, pieces, H, 153), or nullptr: zero. Queries: the state before each piece. Keys: its gradient
    // after each piece; of a prefix (B, H, 153, D) and (B, H, 153).
    const float* S;
    const float* z;
    const Bf16* o;   // (B, T, H, D) contiguous
    TensorView dout;
    void* dx;        // dq or dk: (B, T, H, 16) in bf16, or (column tiles, B, T, H, 16) in fp32
    float* w;        // (B, T, H): the queries' kernel writes w and c, the keys' kernel reads them
    float* c;
    // Keys: the gradient of the state before the text, (B, H, 153, D) and (B, H, 153). Sums: as S and z above.
    float* out_S;
    float* out_z;
    int batch, tokens, heads, value_dim, column_tiles;
    int pieces, piece_chunks;  // chunks of kChunk tokens in a piece
    int normalize;

    __device__ __forceinline__ int64_t token_index(const Piece& piece, int token) const {
        return (static_cast<int64_t>(piece.batch) * tokens + token) * heads + piece.head;
    }
    __device__ __forceinline__ int64_t piece_index(const Piece& piece) const {
        return (static_cast<int64_t>(piece.batch) * pieces + piece.piece) * heads + piece.head;
    }
};

constexpr int kTokenSides = 2;
constexpr int kBackwardThreads = (kTokenSides + 1) * kWarpgroup;
constexpr int kBackwardStages = 4;
constexpr int kTokenRegisters = 176;  // of a thread; there are 168 for each of the 384 threads
constexpr int kStateRegisters = 152;

// Named barriers.
constexpr int kStateSide = 1;  // the state side meets
constexpr int kRead = 2;       // and 3, one per copy of the state: a token side is done with it and with its chunk's tiles

// Tiles of 64 tokens as the tensor cores read them.
__device__ __forceinline__ uint64_t rows16(uint32_t tile) {  // of q or k, K-major
    return matrix_descriptor(tile, 0, 16, 256, Swizzle::k32);
}
__device__ __forceinline__ uint64_t rows64(uint32_t tile, int step) {  // 16 columns of v, do; K-major
    return matrix_descriptor(tile, 32 * step, 16, 1024, Swizzle::k128);
}
// 16 columns of v of the copy of a state, five slabs of features; MN-major.
__device__ __forceinline__ uint64_t state_columns(uint32_t copy, int first_slab, int step) {
    return matrix_descriptor(copy, first_slab * kSlabBytes + step * 16 * 32, kSlabBytes, 256, Swizzle::k32);
}

// product = A B^T for two tiles of 64 tokens x 64 columns.
__device__ __forceinline__ void start_token_products(float (&product)[32], uint32_t a, uint32_t b) {
#pragma unroll
    for (int step = 0; step < kColumns / 16; ++step) wgmma_scores<Bf16>(product, rows64(a, step), rows64(b, step), step > 0);
}

// dphi = X S^T for slabs kFirst .. kFirst + 4.
template <int kFirst>
__device__ __forceinline__ void start_feature_gradients(float (&dphi)[40], uint32_t x, uint32_t copy) {
#pragma unroll
    for (int step = 0; step < kColumns / 16; ++step) {
        wgmma_feature_gradients<Bf16>(dphi, rows64(x, step), state_columns(copy, kFirst, step), step > 0);
    }
    wgmma_commit();
}

// Writes four dims of a token's dq or dk.
__device__ __forceinline__ void store_row_gradient(const BackwardParameters& p, const Piece& piece, int token, int t, float4 x) {
    if (token >= piece.end_token) return;
    const int64_t at = p.token_index(piece, token) * kDim + 4 * t;
    if (p.column_tiles == 1) {
        *reinterpret_cast<uint2*>(static_cast<Bf16*>(p.dx) + at) = make_uint2(pack2<Bf16>(x.x, x.y), pack2<Bf16>(x.z, x.w));
    } else {
        const int64_t tile = static_cast<int64_t>(p.batch) * p.tokens * p.heads * kDim;
        *reinterpret_cast<float4*>(static_cast<float*>(p.dx) + piece.column_tile * tile + at) = x;
    }
}

// The state, or its gradient, in the registers of the state side.
struct RunningState {
    float sums[80];
    Moments moments;
    int warp, lane;

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < 80; ++i) sums[i] = 0.0f;
        moments.clear();
    }
    __device__ __forceinline__ void read(const BackwardParameters& p, const Piece& piece, bool by_piece, bool with_z) {
        const int64_t state = by_piece ? p.piece_index(piece) : piece.state(p);
        const bool known = p.S != nullptr;
        const float* S = known ? p.S + state * kFeatures * p.value_dim + piece.column_tile * kColumns : nullptr;
        read_state(sums, S, piece.columns, p.value_dim, warp, lane);
        moments.read(known && with_z ? p.z + state * kFeatures : nullptr, warp, lane);
    }
    __device__ __forceinline__ void write(const BackwardParameters& p, const Piece& piece, int64_t state) const {
        float* S = p.out_S + state * kFeatures * p.value_dim + piece.column_tile * kColumns;
        write_state(sums, S, piece.columns, p.value_dim, warp, lane);
        if (piece.column_tile == 0) moments.write(p.out_z + state * kFeatures, warp, lane);
    }
    __device__ __forceinline__ void publish(uint32_t copy, uint32_t copy_of_moments, uint32_t published) const {
        publish_state<Bf16>(sums, copy, warp, lane);
        moments.publish(copy_of_moments, warp, lane);
        fence_async_proxy();
        mbarrier_arrive(published);
    }
};

}  // namespace jrt
