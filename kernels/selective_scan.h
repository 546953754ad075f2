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
    const float* A;     // (E, N)
    const void* B;      // (B, T, N), states side by side
    const void* C;
    int64_t B_batch, C_batch;  // strides in elements
    int B_step, C_step;
    const float* D;     // (E)
    const void* gate;   // (B, T, E) with gate_step elements between steps; nullptr: none
    int gate_step;
    void* plain;        // (B, T, E) y before the gate; forward: nullptr keeps none
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
    void* dgate;            // (B, T, E) if there is a gate
    float *dA, *dD, *dbias; // (E, N), (E) and (E)
    void *dB, *dC;          // (B, T, N)
    float* of_segments;     // (B, S, N + 2, E) workspace: the sums over a segment of dA, dD and dbias
    float* of_steps;        // (2, P, B, 16 K, N) workspace: the sums over a slice of dB and dC
};

// Both queue their work on the stream and return nullptr, or a message that says what went wrong.
const char* scan_forward(const ScanArguments& arguments, void* y);
const char* scan_backward(const ScanArguments& arguments, const ScanGradients& gradients);

}  // namespace jrt
