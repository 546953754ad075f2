// What the host side of the kernels offers: plain structs of addresses, sizes and strides; no framework types.
// Shapes: B batch, T tokens, H heads, d = 16 query/key size, D value size, F = 153 features. Strides are in elements.
#pragma once

#include <cstdint>

namespace jrt {

enum class ElementType : int { kBFloat16 = 0, kFloat16 = 1 };

struct TensorView {
    const void* data;      // (B, T, H, last), the last dimension contiguous; nullptr: absent
    int64_t batch_stride;
    int64_t token_stride;
    int64_t head_stride;
};

struct PrefillArguments {
    TensorView q;          // (B, T, H, 16); data == nullptr: only the state is computed, `o` is not written
    TensorView k;          // (B, T, H, 16)
    TensorView v;          // (B, T, H, D)
    TensorView o;          // (B, T, H, D)
    const uint8_t* mask;   // (B, T) bytes, 0 = padding; nullptr: none
    int mask_batch_stride;   // tokens side by side
    const float* initial_S;  // (B, H, 153, D) contiguous, or nullptr: zero
    const float* initial_z;  // (B, H, 153)
    float* S;                // (B, H, 153, D) contiguous
    float* z;                // (B, H, 153)
    float* workspace;        // prefill_workspace() floats; may be nullptr for 0
    int batch, tokens, heads, value_dim;
    int pieces;              // from prefill_pieces()
    ElementType type;
    bool normalize;
    void* stream;            // cudaStream_t
};

struct DecodeArguments {
    TensorView q, k, v, o;  // token_stride unused: T = 1
    const uint8_t* mask;    // (B) bytes, 0 = padding: the state stays; nullptr: none
    int mask_batch_stride;
    const float* old_S;     // (B, H, 153, D) contiguous, the state before the token, or nullptr: zero
    const float* old_z;     // (B, H, 153)
    float* S;               // the state after it; may be the same memory
    float* z;
    int batch, heads, value_dim;
    ElementType type;
    bool normalize;
    void* stream;
};

// The gradients of a text or prefix, bf16 only. A text: `backward_queries`, then `backward_keys` with what it wrote. Where it is
// cut into pieces, `backward_sums` says before each of the two what every piece adds to the state, or to its gradient.
struct BackwardArguments {
    TensorView q, k, v;    // as in PrefillArguments; q.data == nullptr: k and v are a prefix
    const void* o;         // (B, T, H, D) contiguous, the output
    TensorView dout;       // (B, T, H, D), the gradient of o
    const uint8_t* mask;   // as in PrefillArguments
    int mask_batch_stride;
    // Contiguous (B, pieces, H, 153, D) and (B, pieces, H, 153). Queries: the state before each piece, or nullptr: zero. Keys: its
    // gradient after each piece; of a prefix (B, H, 153, D) and (B, H, 153).
    const float* S;
    const float* z;
    void* dx;          // queries: dq, keys: dk. (B, T, H, 16) in bf16; for D > 64 (column tiles, B, T, H, 16) in fp32, to be summed
    void* dv;          // (B, T, H, D) contiguous, written by the keys' kernel
    float* w;          // (B, T, H), written by the queries' kernel and read by the others: 1 / denominator
    float* c;          // (B, T, H), -(do . o) / denominator
    // Keys of a text: the gradient of the state before it, (B, H, 153, D) and (B, H, 153). Sums: as S and z, what each piece adds
    // but the one on which no other depends: the last piece of keys, the first of queries.
    float* out_S;
    float* out_z;
    int batch, tokens, heads, value_dim;
    int pieces;        // of piece_tokens tokens, a multiple of 64; the last may be shorter, and none is empty
    int piece_tokens;
    bool normalize;
    void* stream;
};

// Into how many pieces the sequence of each head is cut on a card of `multiprocessors` (pieces.h). Sizes are at least 1.
int prefill_pieces(int batch, int tokens, int heads, int value_dim, bool only_state, int multiprocessors);

// Size of the workspace in floats.
int64_t prefill_workspace(int batch, int heads, int value_dim, int pieces);

// All queue their work on the stream and return nullptr, or a message that says what went wrong.
const char* prefill(const PrefillArguments& arguments);
const char* backward_queries(const BackwardArguments& arguments);
const char* backward_keys(const BackwardArguments& arguments);
const char* backward_sums(const BackwardArguments& arguments, bool of_queries);
const char* decode_step(const DecodeArguments& arguments);

}  // namespace jrt
