// Selective scan (Mamba, arXiv 2312.00752): h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t, y_t = C_t . h_t + D u_t.
//
// A thread owns one channel with all its N = 16 states in registers and walks through a segment of the text, so that sums
// over states need no exchange between threads. Each text is cut into so many segments that the card is full; what a
// segment adds to the state is computed first, from zero ("local"), and every segment then begins from what those before
// it add up to. Backward runs the same way from the last segment to the first.
//
// The gradients of B and C are sums over channels, that is over the threads of a warp. The tensor cores add them up: a
// product of the 32 lanes' values with a matrix of ones (`add_pair`). In bf16 and fp16 the values are cut to tf32 for it;
// in fp32 their lower bits are added by a second product.
//
// Shapes: B batch, T steps, E channels, N states, K chunks of L = 16 steps, S segments, P slices of W = 128 channels.
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
constexpr int kWarps = kThreads / 32;

__device__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Where a block works: its batch row, segment, channel, and the chunks [first, last) of the segment.
struct Place {
    int b, s, e, first, last, chunks;
    bool inside;  // the channel exists

    __device__ Place(const ScanArguments& p, int segment) {
        b = blockIdx.z, s = segment, e = blockIdx.x * kThreads + threadIdx.x;
        chunks = (p.steps + kSteps - 1) / kSteps;
        const int length = (chunks + p.segments - 1) / p.segments;
        first = min(chunks, s * length), last = min(chunks, first + length);
        inside = e < p.channels;
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

// One channel of a chunk of x (B, T, E), zero beyond the text.
template <typename T>
__device__ void load_steps(float (&values)[kSteps], const void* x, const ScanArguments& p, const Place& at, int chunk) {
    const int t0 = chunk * kSteps;
    const T* from = static_cast<const T*>(x) + (static_cast<int64_t>(at.b) * p.steps + t0) * p.channels + at.e;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
        values[j] = at.inside && t0 + j < p.steps ? static_cast<float>(from[j * p.channels]) : 0.0f;
    }
}

// The step sizes of one channel of a chunk, zero beyond the text.
template <typename T>
__device__ void load_step_sizes(float (&step)[kSteps], const ScanArguments& p, const Place& at, int chunk) {
    load_steps<T>(step, p.delta, p, at, chunk);
    if (p.bias == nullptr) return;
    const float bias = at.inside ? p.bias[at.e] : 0.0f;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
        const float x = step[j] + bias;
        const bool exists = at.inside && chunk * kSteps + j < p.steps;
        step[j] = !exists ? 0.0f : x > 20.0f ? x : log1pf(__expf(x));
    }
}

// B or C of a chunk into shared memory, as [step][state] or [state][step]; zero beyond the text. Ends with all arrived.
template <typename T, bool kByState>
__device__ void load_coefficients(float (&shared)[kSteps][kStates], const void* x, int64_t batch_stride,
                                  int64_t step_stride, const ScanArguments& p, const Place& at, int chunk) {
    for (int i = threadIdx.x; i < kSteps * kStates; i += kThreads) {
        const int j = i / kStates, n = i % kStates, t = chunk * kSteps + j;
        const T* from = static_cast<const T*>(x) + at.b * batch_stride + t * step_stride + n;
        const float value = t < p.steps ? static_cast<float>(*from) : 0.0f;
        if (kByState) {
            shared[n][j] = value;
        } else {
            shared[j][n] = value;
        }
    }
}

__device__ void load_rates(float (&rate)[kStates], const ScanArguments& p, const Place& at) {
#pragma unroll
    for (int n = 0; n < kStates; ++n) rate[n] = at.inside ? p.rates[n * p.channels + at.e] : 0.0f;
}

// ---- (1) what each segment adds, from zero: to the state after it, or backward to the gradient by the state before it.

template <typename T, bool kBackward>
__global__ void __launch_bounds__(kThreads, 5) local_kernel(const ScanArguments p, const void* dy) {
    const Place at(p, blockIdx.y + (kBackward ? 1 : 0));
    __shared__ float coefficients[kSteps][kStates];
    float rate[kStates], h[kStates] = {}, span = 0.0f;
    load_rates(rate, p, at);
    for (int i = at.first; i < at.last; ++i) {
        const int chunk = kBackward ? at.last - 1 - (i - at.first) : i;
        __syncthreads();
        if (kBackward) {
            load_coefficients<T, false>(coefficients, p.C, p.C_batch, p.C_step, p, at, chunk);
        } else {
            load_coefficients<T, false>(coefficients, p.B, p.B_batch, p.B_step, p, at, chunk);
        }
        float step[kSteps], x[kSteps];
        load_step_sizes<T>(step, p, at, chunk);
        load_steps<T>(x, kBackward ? dy : p.u, p, at, chunk);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
            const int j = kBackward ? kSteps - 1 - i : i;
            span += step[j];
            const float in = kBackward ? x[j] : x[j] * step[j];
#pragma unroll
            for (int n = 0; n < kStates; ++n) {
                const float decay = exp2_fast(step[j] * rate[n]), added = in * coefficients[j][n];
                h[n] = kBackward ? decay * (h[n] + added) : fmaf(decay, h[n], added);
            }
        }
    }
    if (!at.inside) return;
    p.spans[at.in_segment(p, at.s)] = span;
#pragma unroll
    for (int n = 0; n < kStates; ++n) p.local[at.in_local(p, at.s, n)] = h[n];
}

// The state with which a segment begins: `start` with what all segments before it added (backward: after it).
__device__ void enter(float (&h)[kStates], const float (&rate)[kStates], const ScanArguments& p, const Place& at,
                      bool backward) {
    const int64_t own = (static_cast<int64_t>(at.b) * p.channels + at.e) * kStates;
#pragma unroll
    for (int n = 0; n < kStates; ++n) h[n] = at.inside && p.start != nullptr ? p.start[own + n] : 0.0f;
    const int count = backward ? p.segments - 1 - at.s : at.s;
    for (int i = 0; i < count; ++i) {
        const int other = backward ? p.segments - 1 - i : i;
        const float span = at.inside ? p.spans[at.in_segment(p, other)] : 0.0f;
#pragma unroll
        for (int n = 0; n < kStates; ++n) {
            const float added = at.inside ? p.local[at.in_local(p, other, n)] : 0.0f;
            h[n] = fmaf(exp2_fast(span * rate[n]), h[n], added);
        }
    }
}

__device__ void leave(const float (&h)[kStates], const ScanArguments& p, const Place& at) {
    const int64_t own = (static_cast<int64_t>(at.b) * p.channels + at.e) * kStates;
#pragma unroll
    for (int n = 0; n < kStates; ++n) p.end[own + n] = h[n];
}

// ---- (2) the outputs

template <typename T>
__global__ void __launch_bounds__(kThreads, 5) output_kernel(const ScanArguments p, void* y) {
    const Place at(p, blockIdx.y);
    __shared__ float B[kSteps][kStates], C[kSteps][kStates];
    float rate[kStates], h[kStates];
    load_rates(rate, p, at);
    enter(h, rate, p, at, false);
    const float skip = at.inside ? p.D[at.e] : 0.0f;
    for (int chunk = at.first; chunk < at.last; ++chunk) {
        __syncthreads();
        load_coefficients<T, false>(B, p.B, p.B_batch, p.B_step, p, at, chunk);
        load_coefficients<T, false>(C, p.C, p.C_batch, p.C_step, p, at, chunk);
        float step[kSteps], u[kSteps];
        load_step_sizes<T>(step, p, at, chunk);
        load_steps<T>(u, p.u, p, at, chunk);
        if (p.between != nullptr && at.inside) {
#pragma unroll
            for (int n = 0; n < kStates; ++n) p.between[at.in_between(p, chunk, n)] = h[n];
        }
        __syncthreads();
        const int t0 = chunk * kSteps;
        T* to = static_cast<T*>(y) + (static_cast<int64_t>(at.b) * p.steps + t0) * p.channels + at.e;
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
            const float x = u[j] * step[j];
            float out[4] = {skip * u[j], 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int n = 0; n < kStates; ++n) {
                h[n] = fmaf(exp2_fast(step[j] * rate[n]), h[n], x * B[j][n]);
                out[n % 4] = fmaf(h[n], C[j][n], out[n % 4]);
            }
            if (at.inside && t0 + j < p.steps) {
                to[j * p.channels] = static_cast<T>((out[0] + out[1]) + (out[2] + out[3]));
            }
        }
    }
    if (at.inside && at.s == p.segments - 1) leave(h, p, at);
}

// ---- (3) the gradients

// Sums over the warp, 16 of them at a time. Value number 2 i + k of each lane is added to row 2 i + k of a 16 x 8 tile,
// whose columns are the sums over four lanes each.
struct Sums {
    float c[4] = {};
    uint32_t even[4], odd[4];  // 1 in the lanes of row 2 q and of row 2 q + 1

    __device__ Sums(const uint32_t (&e)[4], const uint32_t (&o)[4]) {
#pragma unroll
        for (int q = 0; q < 4; ++q) even[q] = e[q], odd[q] = o[q];
    }
    __device__ void add(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
    template <bool kExact>
    __device__ void add_pair(int i, float first, float second) {
        const int q = i % 4;
        const uint32_t e = even[q], o = odd[q];
        const uint32_t b0 = __float_as_uint(first), b1 = __float_as_uint(second);
        if (i < 4) {
            add(e, 0, o, 0, b0, b1);
        } else {
            add(0, e, 0, o, b0, b1);
        }
        if (kExact) {  // tf32 keeps the upper 19 bits
            const uint32_t l0 = __float_as_uint(first - __uint_as_float(b0 & 0xffffe000u));
            const uint32_t l1 = __float_as_uint(second - __uint_as_float(b1 & 0xffffe000u));
            if (i < 4) {
                add(e, 0, o, 0, l0, l1);
            } else {
                add(0, e, 0, o, l0, l1);
            }
        }
    }
    // Row lane / 4 and row lane / 4 + 8, in all four lanes that share lane / 4.
    __device__ float2 rows() const {
        float low = c[0] + c[1], high = c[2] + c[3];
        low += __shfl_xor_sync(~0u, low, 1), high += __shfl_xor_sync(~0u, high, 1);
        low += __shfl_xor_sync(~0u, low, 2), high += __shfl_xor_sync(~0u, high, 2);
        return {low, high};
    }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 3) gradient_kernel(const ScanArguments p, const ScanGradients g) {
    constexpr bool kExact = std::is_same_v<T, float>;
    const Place at(p, blockIdx.y);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __shared__ float B[kStates][kSteps], C[kStates][kSteps];
    __shared__ float rates[kStates][kThreads], by_state[kStates][kThreads], by_rate[kStates][kThreads];
    __shared__ float sums[kWarps][kStates][2 * kSteps + 1];  // of dB and dC
    {
        float rate[kStates], dh[kStates];
        load_rates(rate, p, at);
        enter(dh, rate, p, at, true);
#pragma unroll
        for (int n = 0; n < kStates; ++n) {
            rates[n][threadIdx.x] = rate[n], by_state[n][threadIdx.x] = dh[n], by_rate[n][threadIdx.x] = 0.0f;
        }
    }
    uint32_t even[4], odd[4];
    const uint32_t one = __float_as_uint(1.0f);
#pragma unroll
    for (int q = 0; q < 4; ++q) even[q] = lane / 4 == 2 * q ? one : 0, odd[q] = lane / 4 == 2 * q + 1 ? one : 0;

    const float skip = at.inside ? p.D[at.e] : 0.0f;
    float by_skip = 0.0f, by_bias = 0.0f;
    for (int chunk = at.last - 1; chunk >= at.first; --chunk) {
        __syncthreads();
        load_coefficients<T, true>(B, p.B, p.B_batch, p.B_step, p, at, chunk);
        load_coefficients<T, true>(C, p.C, p.C_batch, p.C_step, p, at, chunk);
        float step[kSteps], x[kSteps], out[kSteps], by_input[kSteps] = {}, by_decay[kSteps] = {};
        load_step_sizes<T>(step, p, at, chunk);
        load_steps<T>(x, p.u, p, at, chunk);
        load_steps<T>(out, g.dy, p, at, chunk);
#pragma unroll
        for (int j = 0; j < kSteps; ++j) x[j] *= step[j];
        float next = at.inside ? p.between[at.in_between(p, chunk, 0)] : 0.0f;
        __syncthreads();
#pragma unroll 1
        for (int n = 0; n < kStates; ++n) {
            const float rate = rates[n][threadIdx.x];
            float h = next;
            if (n + 1 < kStates) next = at.inside ? p.between[at.in_between(p, chunk, n + 1)] : 0.0f;
            // The chunk's states again: kept_t = a_t h_{t-1}, h_t = kept_t + x_t B_t.
            float decay[kSteps], kept[kSteps];
            Sums by_C(even, odd), by_B(even, odd);
#pragma unroll
            for (int i = 0; i < kSteps / 2; ++i) {
                float product[2];
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const int j = 2 * i + k;
                    decay[j] = exp2_fast(step[j] * rate);
                    kept[j] = decay[j] * h;
                    h = fmaf(x[j], B[n][j], kept[j]);
                    product[k] = out[j] * h;
                }
                by_C.add_pair<kExact>(i, product[0], product[1]);
            }
            // Back through it: g_t = C_t dy_t + a_{t+1} g_{t+1}.
            float dh = by_state[n][threadIdx.x], rate_sum = 0.0f;
#pragma unroll
            for (int i = kSteps / 2 - 1; i >= 0; --i) {
                float product[2];
#pragma unroll
                for (int k = 1; k >= 0; --k) {
                    const int j = 2 * i + k;
                    dh = fmaf(out[j], C[n][j], dh);
                    product[k] = dh * x[j];
                    const float through = dh * kept[j];
                    rate_sum = fmaf(through, step[j], rate_sum);
                    by_decay[j] = fmaf(through, rate, by_decay[j]);
                    by_input[j] = fmaf(dh, B[n][j], by_input[j]);
                    dh *= decay[j];
                }
                by_B.add_pair<kExact>(i, product[0], product[1]);
            }
            by_state[n][threadIdx.x] = dh;
            by_rate[n][threadIdx.x] += rate_sum;
            const float2 rows_B = by_B.rows(), rows_C = by_C.rows();
            if (lane % 4 == 0) {
                float* to = sums[warp][n];
                to[lane / 4] = rows_B.x, to[lane / 4 + 8] = rows_B.y;
                to[lane / 4 + 16] = rows_C.x, to[lane / 4 + 24] = rows_C.y;
            }
        }
        __syncthreads();
        const int64_t slice = (static_cast<int64_t>(blockIdx.x) * gridDim.z + at.b) * at.chunks + chunk;
        for (int i = threadIdx.x; i < 2 * kSteps * kStates; i += kThreads) {
            const int n = i % kStates, j = i / kStates;
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) sum += sums[w][n][j];
            float* to = j < kSteps ? g.dB : g.dC;
            to[(slice * kSteps + j % kSteps) * kStates + n] = sum;
        }
        const int t0 = chunk * kSteps;
        const int64_t row = (static_cast<int64_t>(at.b) * p.steps + t0) * p.channels + at.e;
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
            if (!at.inside || t0 + j >= p.steps) continue;
            const int64_t here = row + j * p.channels;
            const float u = static_cast<float>(static_cast<const T*>(p.u)[here]);
            by_skip = fmaf(out[j], u, by_skip);
            static_cast<T*>(g.du)[here] = static_cast<T>(fmaf(by_input[j], step[j], skip * out[j]));
            float by_step = fmaf(by_input[j], u, by_decay[j] * 0.6931471805599453f);  // decays were summed against A log2(e)
            if (p.bias != nullptr) {
                by_step *= -expm1f(-step[j]);  // the slope of softplus, by its value
                by_bias += by_step;
            }
            static_cast<T*>(g.ddelta)[here] = static_cast<T>(by_step);
        }
    }
    if (!at.inside) return;
    g.dD[at.in_segment(p, at.s)] = by_skip;
    g.dbias[at.in_segment(p, at.s)] = by_bias;
    float dh[kStates];
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
        g.dA[at.in_local(p, at.s, n)] = by_rate[n][threadIdx.x];
        dh[n] = by_state[n][threadIdx.x];
    }
    if (at.s == 0) leave(dh, p, at);
}

template <typename T>
void launch_forward(const ScanArguments& p, void* y, cudaStream_t stream) {
    const dim3 grid((p.channels + kThreads - 1) / kThreads, p.segments, p.batch);
    if (p.segments > 1) {
        local_kernel<T, false><<<dim3(grid.x, p.segments - 1, grid.z), kThreads, 0, stream>>>(p, nullptr);
    }
    output_kernel<T><<<grid, kThreads, 0, stream>>>(p, y);
}

template <typename T>
void launch_backward(const ScanArguments& p, const ScanGradients& g, cudaStream_t stream) {
    const dim3 grid((p.channels + kThreads - 1) / kThreads, p.segments, p.batch);
    if (p.segments > 1) {
        local_kernel<T, true><<<dim3(grid.x, p.segments - 1, grid.z), kThreads, 0, stream>>>(p, g.dy);
    }
    gradient_kernel<T><<<grid, kThreads, 0, stream>>>(p, g);
}

const char* last_error() {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* scan_forward(const ScanArguments& p, void* y) {
    const auto stream = static_cast<cudaStream_t>(p.stream);
    switch (p.type) {
        case ScanType::kFloat32: launch_forward<float>(p, y, stream); break;
        case ScanType::kBFloat16: launch_forward<__nv_bfloat16>(p, y, stream); break;
        case ScanType::kFloat16: launch_forward<__half>(p, y, stream); break;
    }
    return last_error();
}

const char* scan_backward(const ScanArguments& p, const ScanGradients& g) {
    const auto stream = static_cast<cudaStream_t>(p.stream);
    switch (p.type) {
        case ScanType::kFloat32: launch_backward<float>(p, g, stream); break;
        case ScanType::kBFloat16: launch_backward<__nv_bfloat16>(p, g, stream); break;
        case ScanType::kFloat16: launch_backward<__half>(p, g, stream); break;
    }
    return last_error();
}

}  // namespace jrt
