// The selective scan's kernels as the host calls them: plain addresses, sizes and strides.
// Shapes: B batch, T steps, E channels, N = 16 states a channel, K chunks of 16 steps, S segments of whole chunks,
// P slices of 128 channels.
#pragma once

#include <cstdint>

namespace jrt {

enum class ScanType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct ScanArguments {
    const void* u;      // (B, T, E) contiguous, of the type below, as are delta, B, C, y and their gradients
    const void* delta;  // (B, T, E) contiguous
    const float* bias;  // (E): the step size is softplus(delta + bias); nullptr: it is delta
    const float* rates; // (N, E): A log2(e)
    const void* B;      // (B, T, N), states side by side
    const void* C;
    int64_t B_batch, B_step, C_batch, C_step;  // strides in elements
    const float* D;     // (E)
    const float* start; // (B, E, N): forward, the initial state; backward, the gradient of the final state
    float* end;         // (B, E, N): forward, the final state; backward, the gradient of the initial state
    float* between;     // (B, K, N, E) states before each chunk; forward: nullptr keeps none
    float* local;       // (B, S, N, E) workspace
    float* spans;       // (B, S, E) workspace
    int batch, steps, channels, segments;
    ScanType type;
    void* stream;       // cudaStream_t
};

struct ScanGradients {
    const void* dy;         // (B, T, E) contiguous
    void *du, *ddelta;      // (B, T, E)
    float *dA, *dD, *dbias; // (B, S, N, E), (B, S, E) and (B, S, E): sums over a segment
    float *dB, *dC;         // (P, B, 16 K, N): sums over a slice
};

// Both queue their work on the stream and return nullptr, or a message that says what went wrong.
const char* scan_forward(const ScanArguments& arguments, void* y);
const char* scan_backward(const ScanArguments& arguments, const ScanGradients& gradients);

}  // namespace jrt
