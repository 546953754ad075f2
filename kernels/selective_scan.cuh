// What the forward and the backward kernels of the selective scan share: places, arithmetic, loads, and the pass that
// computes what a segment adds (`local_kernel`). selective_scan.cu describes the whole.
//
// Shapes: B batch, T steps, E channels, N states, K chunks of L = 16 steps, S segments, P slices of W = 128 channels.
#pragma once

#include "selective_scan.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

namespace jrt {
namespace {

constexpr int kThreads = 128;  // W
constexpr int kStates = 16;    // N
constexpr int kSteps = 16;     // L
constexpr int kSharers = 4;                      // threads that share a channel, in the kernels that say so
constexpr int kOwn = kStates / kSharers;         // states of one of them
constexpr int kGroup = kThreads / kSharers;      // channels of their block
constexpr int kRows = kSteps * kGroup / kThreads;  // steps of a chunk that one of them loads, of one channel
constexpr int kHalf = kThreads / kStates;        // steps of B or C that a block loads at a time

template <typename T>
__device__ float sigmoid(float x) {
    return std::is_same_v<T, float> ? 1.0f / (1.0f + expf(-x)) : __fdividef(1.0f, 1.0f + __expf(-x));
}

__device__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Where a block works: its batch row, segment, channel, and the chunks [first, last) of the segment.
struct Place {
    int b, s, e, first, last, chunks;
    bool inside;  // the channel exists

    __device__ Place(const ScanArguments& p, int segment, int channel) {
        b = blockIdx.z, s = segment, e = channel;
        chunks = (p.steps + kSteps - 1) / kSteps;
        const int length = (chunks + p.segments - 1) / p.segments;
        first = min(chunks, s * length), last = min(chunks, first + length);
        inside = e < p.channels;
    }
    __device__ int64_t in_text(const ScanArguments& p, int step) const {  // of (B, T, E)
        return (static_cast<int64_t>(b) * p.steps + step) * p.channels + e;
    }
    __device__ int64_t in_gate(const ScanArguments& p, int step) const {  // of (B, T, E) with wider rows
        return (static_cast<int64_t>(b) * p.steps + step) * p.gate_step + e;
    }
    __device__ int exist(const ScanArguments& p, int chunk) const {  // steps of a chunk inside the text; none without a channel
        return inside ? min(kSteps, p.steps - chunk * kSteps) : 0;
    }
    __device__ int64_t in_segment(const ScanArguments& p, int segment) const {  // of (B, S, E)
        return (static_cast<int64_t>(b) * p.segments + segment) * p.channels + e;
    }
    __device__ int64_t in_local(const ScanArguments& p, int segment, int n) const {  // of (B, S, N, E)
        return ((static_cast<int64_t>(b) * p.segments + segment) * kStates + n) * p.channels + e;
    }
    __device__ int64_t in_between(const ScanArguments& p, int chunk, int n) const {  // of (B, K, N, E)
        return ((static_cast<int64_t>(b) * chunks + chunk) * kStates + n) * p.channels + e;
    }
};

// One channel of a chunk of x (B, T, E), of which `exist` steps are inside the text; zero beyond.
template <typename T>
__device__ void load_steps(float (&values)[kSteps], const T* from, int channels, int exist) {
    if (exist == kSteps) {
#pragma unroll
        for (int j = 0; j < kSteps; ++j) values[j] = static_cast<float>(from[j * channels]);
    } else {
#pragma unroll
        for (int j = 0; j < kSteps; ++j) values[j] = j < exist ? static_cast<float>(from[j * channels]) : 0.0f;
    }
}

template <typename T>
__device__ void store_steps(T* to, const float (&values)[kSteps], int channels, int exist) {
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
        if (j < exist) to[j * channels] = static_cast<T>(values[j]);
    }
}

// log(1 + z) for z >= 0. In the 16-bit types 7e-6 of the result are exact enough, and the hardware's logarithm serves where
// 1 + z does not cut z off.
template <typename T>
__device__ float log_one_plus(float z) {
    if (std::is_same_v<T, float>) return log1pf(z);
    const float series = z * fmaf(z, fmaf(z, fmaf(z, -0.25f, 1.0f / 3.0f), -0.5f), 1.0f);
    return z < 0.03f ? series : __logf(1.0f + z);
}

// 1 - exp(-x) for x >= 0, as exact as `log_one_plus`.
template <typename T>
__device__ float one_minus_exp(float x) {
    if (std::is_same_v<T, float>) return -expm1f(-x);
    const float series = x * fmaf(x, fmaf(x, fmaf(x, -1.0f / 24.0f, 1.0f / 6.0f), -0.5f), 1.0f);
    return x < 0.03f ? series : 1.0f - __expf(-x);
}

// The step size that an input stands for: if `is_soft`, its softplus after the bias is added.
template <typename T>
__device__ float step_size(float x, bool is_soft, float bias) {
    const float moved = x + bias, soft = moved > 20.0f ? moved : log_one_plus<T>(__expf(moved));
    return is_soft ? soft : x;
}

// B or C of a chunk into shared memory, zero beyond the text. `from` is the batch row's first step.
template <typename T>
__device__ void load_coefficients(float (&shared)[kStates][kSteps], const T* from, int stride, int steps, int chunk) {
    const int n = threadIdx.x % kStates;
#pragma unroll
    for (int j = threadIdx.x / kStates; j < kSteps; j += kThreads / kStates) {
        const int t = chunk * kSteps + j;
        shared[n][j] = t < steps ? static_cast<float>(from[static_cast<int64_t>(t) * stride + n]) : 0.0f;
    }
}

// The rates of `kCount` states of a channel, from state n0 on.
template <int kCount>
__device__ void load_rates(float (&rate)[kCount], const ScanArguments& p, const Place& at, int n0) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
        const float a = at.inside ? p.A[static_cast<int64_t>(at.e) * kStates + n0 + n] : 0.0f;
        rate[n] = a * 1.4426950408889634f;  // exp(delta A) = exp2(delta rate)
    }
}

// The state with which a segment begins: `start` with what all segments before it added (backward: after it).
template <int kCount>
__device__ void enter(float (&h)[kCount], const float (&rate)[kCount], const ScanArguments& p, const Place& at, int n0,
                      bool backward) {
    const int64_t own = (static_cast<int64_t>(at.b) * p.channels + at.e) * kStates + n0;
#pragma unroll
    for (int n = 0; n < kCount; ++n) h[n] = at.inside && p.start != nullptr ? p.start[own + n] : 0.0f;
    const int count = backward ? p.segments - 1 - at.s : at.s;
    for (int i = 0; i < count; ++i) {
        const int other = backward ? p.segments - 1 - i : i;
        const float span = at.inside ? p.spans[at.in_segment(p, other)] : 0.0f;
#pragma unroll
        for (int n = 0; n < kCount; ++n) {
            const float added = at.inside ? p.local[at.in_local(p, other, n0 + n)] : 0.0f;
            h[n] = fmaf(exp2_fast(span * rate[n]), h[n], added);
        }
    }
}

template <int kCount>
__device__ void leave(const float (&h)[kCount], const ScanArguments& p, const Place& at, int n0) {
    const int64_t own = (static_cast<int64_t>(at.b) * p.channels + at.e) * kStates + n0;
#pragma unroll
    for (int n = 0; n < kCount; ++n) p.end[own + n] = h[n];
}

// ---- The inputs of a chunk, for kernels whose threads share channels. While a chunk is computed, the next one's inputs
// are on their way from memory in registers (`Ahead`); they are then put into shared memory (`Stage`).

struct Stage {
    float2 steps[kSteps][kGroup];  // step size, and the other input: u times step size, or dy
    float first[kSteps][kStates], second[kSteps][kStates];  // B or C; C
};

// kGated: with gates; kBoth: with two kinds of coefficients.
template <typename T, bool kGated, bool kBoth>
struct Ahead {
    T x[kRows], delta[kRows], gate[kRows], first[2], second[2];  // of channel threadIdx.x % kGroup; two coefficients each
    const T *x_at, *delta_at, *gate_at, *first_at, *second_at;   // their places in the chunk that is loaded next
    int x_move, gate_move, first_move, second_move;              // from a chunk to the next one

    // Begins with `chunk` and goes forward, or backward. x: u or dy; coefficients: B or C; others: C, if kBoth.
    __device__ Ahead(const void* x_of_all, const void* coefficients, int64_t batch_stride, int step_stride,
                     const void* others, const ScanArguments& p, const Place& loads, int chunk, bool backward) {
        const int sign = backward ? -1 : 1, t0 = chunk * kSteps, n = threadIdx.x % kStates;
        const int64_t from = loads.in_text(p, t0 + threadIdx.x / kGroup), t = t0 + threadIdx.x / kStates;
        x_at = static_cast<const T*>(x_of_all) + from, delta_at = static_cast<const T*>(p.delta) + from;
        first_at = static_cast<const T*>(coefficients) + loads.b * batch_stride + t * step_stride + n;
        second_at = static_cast<const T*>(others) + loads.b * p.C_batch + t * p.C_step + n;
        gate_at = static_cast<const T*>(p.gate) + loads.in_gate(p, t0 + threadIdx.x / kGroup);
        gate_move = sign * kSteps * p.gate_step;
        x_move = sign * kSteps * p.channels, first_move = sign * kSteps * step_stride;
        second_move = sign * kSteps * p.C_step;
    }

    __device__ void load(int step_stride, const ScanArguments& p, const Place& loads, int chunk) {
        const int left = p.steps - chunk * kSteps, row = threadIdx.x / kGroup, step = threadIdx.x / kStates;
        const int rows = kSharers * p.channels;  // elements between two rows of a thread
        const auto all = [&](auto exists_row, auto exists_step) {
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                const bool exists = exists_row(row + i * kSharers);
                x[i] = exists ? x_at[i * rows] : static_cast<T>(0.0f);
                delta[i] = exists ? delta_at[i * rows] : static_cast<T>(0.0f);
                if (kGated) gate[i] = exists ? gate_at[i * kSharers * p.gate_step] : static_cast<T>(0.0f);
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const bool exists = exists_step(step + i * kHalf);
                first[i] = exists ? first_at[i * kHalf * step_stride] : static_cast<T>(0.0f);
                if (kBoth) second[i] = exists ? second_at[i * kHalf * p.C_step] : static_cast<T>(0.0f);
            }
        };
        if (loads.inside && left >= kSteps) {
            all([](int) { return true; }, [](int) { return true; });
        } else {
            all([&](int j) { return loads.inside && j < left; }, [&](int j) { return j < left; });
        }
        x_at += x_move, delta_at += x_move, first_at += first_move;
        if (kBoth) second_at += second_move;
        if (kGated) gate_at += gate_move;
    }

    // Of the second input, kForward: u times the step size; else: dy, which is the gradient of y times silu(z).
    template <bool kForward>
    __device__ void put(Stage& stage, const ScanArguments& p, const Place& loads, int chunk, float bias) const {
        const int row = threadIdx.x / kGroup, exist = loads.exist(p, chunk);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const int j = row + i * kSharers;
            const float size = step_size<T>(static_cast<float>(delta[i]), p.bias != nullptr, bias);
            const float step = j < exist ? size : 0.0f, z = kGated ? static_cast<float>(gate[i]) : 0.0f;
            const float factor = kForward ? step : kGated ? z * sigmoid<T>(z) : 1.0f;
            stage.steps[j][threadIdx.x % kGroup] = {step, static_cast<float>(x[i]) * factor};
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int j = threadIdx.x / kStates + i * kHalf, n = threadIdx.x % kStates;
            stage.first[j][n] = static_cast<float>(first[i]);
            if (kBoth) stage.second[j][n] = static_cast<float>(second[i]);
        }
    }
};

__device__ float bias_of(const ScanArguments& p, const Place& at) {
    return p.bias != nullptr && at.inside ? p.bias[at.e] : 0.0f;
}

// ---- (1) what each segment adds, from zero: to the state after it, or backward to the gradient by the state before it.
// Threads share channels.

template <typename T, bool kBackward, bool kGated>
__global__ void __launch_bounds__(kThreads, 6) local_kernel(const ScanArguments p, const void* dy) {
    const int segment = blockIdx.y + (kBackward ? 1 : 0), own = threadIdx.x / kSharers;
    const int n0 = threadIdx.x % kSharers * kOwn;
    const Place at(p, segment, blockIdx.x * kGroup + own);
    const Place loads(p, segment, blockIdx.x * kGroup + threadIdx.x % kGroup);
    __shared__ Stage stages[2];
    const void* x = kBackward ? dy : p.u;
    const void* coefficients = kBackward ? p.C : p.B;
    const int64_t batch_stride = kBackward ? p.C_batch : p.B_batch;
    const int step_stride = kBackward ? p.C_step : p.B_step;
    const float bias = bias_of(p, loads);
    float rate[kOwn], h[kOwn] = {}, span = 0.0f;
    load_rates(rate, p, at, n0);
    const int count = at.last - at.first, begin = kBackward ? at.last - 1 : at.first;
    Ahead<T, kGated, false> ahead(x, coefficients, batch_stride, step_stride, nullptr, p, loads, begin, kBackward);
    for (int i = 0; i <= count; ++i) {  // one round ahead of the computation
        const int next = kBackward ? begin - i : begin + i;
        if (i < count) ahead.load(step_stride, p, loads, next);
        if (i > 0) {
            const Stage& stage = stages[(i - 1) % 2];
#pragma unroll
            for (int k = 0; k < kSteps; ++k) {
                const int j = kBackward ? kSteps - 1 - k : k;
                const float2 in = stage.steps[j][own];
                span += in.x;
#pragma unroll
                for (int n = 0; n < kOwn; ++n) {
                    const float decay = exp2_fast(in.x * rate[n]), added = in.y * stage.first[j][n0 + n];
                    h[n] = kBackward ? decay * (h[n] + added) : fmaf(decay, h[n], added);
                }
            }
        }
        if (i < count) ahead.template put<!kBackward>(stages[i % 2], p, loads, next, bias);
        __syncthreads();
    }
    if (!at.inside) return;
    if (n0 == 0) p.spans[at.in_segment(p, at.s)] = span;
#pragma unroll
    for (int n = 0; n < kOwn; ++n) p.local[at.in_local(p, at.s, n0 + n)] = h[n];
}

// Calls launch(T{}) with the element type of the call; returns the error of the launch, or nullptr.
template <typename Launch>
const char* launch_as(ScanType type, Launch launch) {
    switch (type) {
        case ScanType::kFloat32: launch(float{}); break;
        case ScanType::kBFloat16: launch(__nv_bfloat16{}); break;
        case ScanType::kFloat16: launch(__half{}); break;
    }
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace
}  // namespace jrt
