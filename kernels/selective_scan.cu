// Selective scan (Mamba, arXiv 2312.00752): h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t, y_t = C_t . h_t + D u_t.
// With a gate z, y_t is then multiplied by silu(z_t).
//
// Forward, four neighbouring threads share a channel and each keeps four of its N = 16 states in registers. Backward, a
// thread owns a channel with all its states. Threads walk through a segment of the text. Each text is cut into so many
// segments that the card is full, forward often into one. If there are more, what a segment adds to the state is computed
// first, from zero ("local"), and every segment then begins from what those before it add up to. Backward runs the same
// way from the last segment to the first.
//
// This file has the outputs, selective_scan_backward.cu the gradients, selective_scan.cuh what they share.
//
// Shapes: B batch, T steps, E channels, N states, K chunks of L = 16 steps, S segments, P slices of W = 128 channels.
#include "selective_scan.cuh"

namespace jrt {
namespace {

// Each of the four threads that share a channel has a part of four sums; number i of them gets the sum number i.
__device__ float own_sum(const float (&part)[kSharers]) {
    const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
    const float low = (odd ? part[1] : part[0]) + __shfl_xor_sync(~0u, odd ? part[0] : part[1], 1);
    const float high = (odd ? part[3] : part[2]) + __shfl_xor_sync(~0u, odd ? part[2] : part[3], 1);
    return (upper ? high : low) + __shfl_xor_sync(~0u, upper ? low : high, 2);
}

template <typename T, bool kGated>
__global__ void __launch_bounds__(kThreads, 5) output_kernel(const ScanArguments p, void* y) {
    const int own = threadIdx.x / kSharers, sharer = threadIdx.x % kSharers, n0 = sharer * kOwn;
    const int row = threadIdx.x / kGroup, column = threadIdx.x % kGroup;
    const Place at(p, blockIdx.y, blockIdx.x * kGroup + own), loads(p, blockIdx.y, blockIdx.x * kGroup + column);
    __shared__ Stage stages[2];
    __shared__ float outputs[2][kSteps][kGroup + 8];  // without the skip; the 8 keep four threads in different banks
    const float bias = bias_of(p, loads), skip = loads.inside ? p.D[loads.e] : 0.0f;
    float rate[kOwn], h[kOwn];
    load_rates(rate, p, at, n0);
    enter(h, rate, p, at, n0, false);
    Ahead<T, kGated, true> ahead(p.u, p.B, p.B_batch, p.B_step, p.C, p, loads, at.first, false);
    T u[kRows], gate[kRows];  // of the chunk that is computed
    T* to = static_cast<T*>(y) + loads.in_text(p, at.first * kSteps + row);
    T* plain = static_cast<T*>(p.plain) + loads.in_text(p, at.first * kSteps + row);
    float* keep = p.between + at.in_between(p, at.first, n0);
    const int count = at.last - at.first;
    for (int i = 0; i <= count; ++i) {  // one round ahead of the computation
        const int next = at.first + i, chunk = next - 1;
        if (i < count) ahead.load(p.B_step, p, loads, next);
        if (i > 0) {
            if (p.between != nullptr && at.inside) {
#pragma unroll
                for (int n = 0; n < kOwn; ++n) keep[n * p.channels] = h[n];
            }
            keep += kStates * p.channels;
            const Stage& stage = stages[(i - 1) % 2];
#pragma unroll
            for (int j0 = 0; j0 < kSteps; j0 += kSharers) {
                float part[kSharers];
#pragma unroll
                for (int k = 0; k < kSharers; ++k) {
                    const int j = j0 + k;
                    const float2 in = stage.steps[j][own];
                    part[k] = 0.0f;
#pragma unroll
                    for (int n = 0; n < kOwn; ++n) {
                        h[n] = fmaf(exp2_fast(in.x * rate[n]), h[n], in.y * stage.first[j][n0 + n]);
                        part[k] = fmaf(h[n], stage.second[j][n0 + n], part[k]);
                    }
                }
                outputs[i % 2][j0 + sharer][own] = own_sum(part);
            }
        }
        if (i < count) ahead.template put<true>(stages[i % 2], p, loads, next, bias);
        __syncthreads();
        if (i > 0) {
            const int exist = loads.exist(p, chunk);
#pragma unroll
            for (int k = 0; k < kRows; ++k) {
                const int j = row + k * kSharers;
                const float whole = fmaf(skip, static_cast<float>(u[k]), outputs[i % 2][j][column]);
                if (j >= exist) continue;
                const float z = kGated ? static_cast<float>(gate[k]) : 0.0f;
                to[k * kSharers * p.channels] = static_cast<T>(kGated ? whole * z * sigmoid<T>(z) : whole);
                if (kGated && p.plain != nullptr) plain[k * kSharers * p.channels] = static_cast<T>(whole);
            }
            to += kSteps * p.channels, plain += kSteps * p.channels;
        }
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
            u[k] = ahead.x[k];
            if (kGated) gate[k] = ahead.gate[k];
        }
    }
    if (at.inside && at.s == p.segments - 1) leave(h, p, at, n0);
}

template <typename T>
void launch_forward(const ScanArguments& p, void* y) {
    const auto stream = static_cast<cudaStream_t>(p.stream);
    const dim3 grid((p.channels + kGroup - 1) / kGroup, p.segments, p.batch);
    if (p.segments > 1) {
        local_kernel<T, false, false><<<dim3(grid.x, p.segments - 1, grid.z), kThreads, 0, stream>>>(p, nullptr);
    }
    const auto kernel = p.gate != nullptr ? output_kernel<T, true> : output_kernel<T, false>;
    kernel<<<grid, kThreads, 0, stream>>>(p, y);
}

}  // namespace

const char* scan_forward(const ScanArguments& p, void* y) {
    return launch_as(p.type, [&](auto zero) { launch_forward<decltype(zero)>(p, y); });
}

}  // namespace jrt
