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

// Into how many pieces the sequence of each head is cut on a card of `multiprocessors` (pieces.h). Sizes are at least 1.
int prefill_pieces(int batch, int tokens, int heads, int value_dim, bool only_state, int multiprocessors);

// Size of the workspace in floats.
int64_t prefill_workspace(int batch, int heads, int value_dim, int pieces);

// Both queue their work on the stream and return nullptr, or a message that says what went wrong.
const char* prefill(const PrefillArguments& arguments);
const char* decode_step(const DecodeArguments& arguments);

}  // namespace jrt
