// The gradients of the selective scan (selective_scan.cu): a thread owns a channel with all its N = 16 states.
//
// The gradients of B and C are sums over channels, that is over the threads of a warp. The tensor cores add them up: a
// product of the 32 lanes' values with a matrix of ones (`add_pair`). In bf16 and fp16 the values are cut to tf32 for it;
// in fp32 their lower bits are added by a second product.
//
// Shapes: B batch, T steps, E channels, N states, K chunks of L = 16 steps, S segments, P slices of W = 128 channels.
#include "selective_scan.cuh"

#include <algorithm>

namespace jrt {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr int kSums = kStates + 2;  // of a channel over a segment: the gradients of A, D and the bias

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
    const Place at(p, blockIdx.y, blockIdx.x * kThreads + threadIdx.x);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __shared__ float B[kStates][kSteps], C[kStates][kSteps];
    __shared__ float rates[kStates][kThreads], by_state[kStates][kThreads], by_rate[kStates][kThreads];
    __shared__ float sums[kWarps][kStates][2 * kSteps + 1];  // of dB and dC
    {
        float rate[kStates], dh[kStates];
        load_rates(rate, p, at, 0);
        enter(dh, rate, p, at, 0, true);
#pragma unroll
        for (int n = 0; n < kStates; ++n) {
            rates[n][threadIdx.x] = rate[n], by_state[n][threadIdx.x] = dh[n], by_rate[n][threadIdx.x] = 0.0f;
        }
    }
    uint32_t even[4], odd[4];
    const uint32_t one = __float_as_uint(1.0f);
#pragma unroll
    for (int q = 0; q < 4; ++q) even[q] = lane / 4 == 2 * q ? one : 0, odd[q] = lane / 4 == 2 * q + 1 ? one : 0;

    const float skip = at.inside ? p.D[at.e] : 0.0f, bias = bias_of(p, at);
    float by_skip = 0.0f, by_bias = 0.0f;
    const bool is_soft = p.bias != nullptr;
    const T* B_of_row = static_cast<const T*>(p.B) + at.b * p.B_batch;
    const T* C_of_row = static_cast<const T*>(p.C) + at.b * p.C_batch;
    for (int chunk = at.last - 1; chunk >= at.first; --chunk) {
        __syncthreads();
        load_coefficients(B, B_of_row, p.B_step, p.steps, chunk);
        load_coefficients(C, C_of_row, p.C_step, p.steps, chunk);
        const int exist = at.exist(p, chunk);
        const int64_t here = at.in_text(p, chunk * kSteps);
        float step[kSteps], x[kSteps], out[kSteps], by_input[kSteps] = {}, by_decay[kSteps] = {};
        load_steps(step, static_cast<const T*>(p.delta) + here, p.channels, exist);
        load_steps(x, static_cast<const T*>(p.u) + here, p.channels, exist);
        load_steps(out, static_cast<const T*>(g.dy) + here, p.channels, exist);
        const float* states = p.between + at.in_between(p, chunk, 0);
        float next = at.inside ? *states : 0.0f;
        if (p.gate != nullptr) {  // the gradient of the gate; and that of y before the gate, in place of the one after
            float z[kSteps], plain[kSteps];
            load_steps(z, static_cast<const T*>(p.gate) + at.in_gate(p, chunk * kSteps), p.gate_step, exist);
            load_steps(plain, static_cast<const T*>(p.plain) + here, p.channels, exist);
#pragma unroll
            for (int j = 0; j < kSteps; ++j) {
                const float share = sigmoid<T>(z[j]), by_silu = out[j] * plain[j];
                out[j] *= z[j] * share;
                z[j] = by_silu * share * (1.0f + z[j] * (1.0f - share));
            }
            store_steps(static_cast<T*>(g.dgate) + here, z, p.channels, exist);
        }
        if (is_soft) {
#pragma unroll
            for (int j = 0; j < kSteps; ++j) step[j] = step_size<T>(step[j], true, bias);
            if (exist < kSteps) {
#pragma unroll
                for (int j = 0; j < kSteps; ++j) step[j] = j < exist ? step[j] : 0.0f;
            }
        }
#pragma unroll
        for (int j = 0; j < kSteps; ++j) x[j] *= step[j];
        __syncthreads();
#pragma unroll 1
        for (int n = 0; n < kStates; ++n) {
            const float rate = rates[n][threadIdx.x];
            float h = next;
            states += p.channels;
            if (n + 1 < kStates && at.inside) next = *states;
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
        const int64_t all = static_cast<int64_t>(gridDim.x) * gridDim.z * at.chunks;  // slices of dB; then come those of dC
#pragma unroll
        for (int i = 0; i < 2 * kSteps / kHalf; ++i) {  // kHalf of the 16 steps of dB, then of dC, at a time
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) sum += sums[w][threadIdx.x % kStates][i * kHalf + threadIdx.x / kStates];
            const int part = i % (kSteps / kHalf);
            const int64_t from = (i * kHalf < kSteps ? slice : all + slice) * kSteps * kStates;
            g.of_steps[from + part * kThreads + threadIdx.x] = sum;
        }
        float u[kSteps];  // x is u times step size
        load_steps(u, static_cast<const T*>(p.u) + here, p.channels, exist);
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
            by_skip = fmaf(out[j], u[j], by_skip);
            const float by_step = fmaf(by_input[j], u[j], by_decay[j] * 0.6931471805599453f);  // rates are A log2(e)
            const float slope = is_soft ? one_minus_exp<T>(step[j]) : 1.0f;  // of softplus, by its value
            by_bias = fmaf(by_step, slope, by_bias);
            by_decay[j] = by_step * slope;
            by_input[j] = fmaf(by_input[j], step[j], skip * out[j]);
        }
        store_steps(static_cast<T*>(g.du) + here, by_input, p.channels, exist);
        store_steps(static_cast<T*>(g.ddelta) + here, by_decay, p.channels, exist);
    }
    if (!at.inside) return;
    float* of_segment = g.of_segments + (static_cast<int64_t>(at.b) * p.segments + at.s) * kSums * p.channels + at.e;
    of_segment[kStates * p.channels] = by_skip, of_segment[(kStates + 1) * p.channels] = by_bias;
    float dh[kStates];
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
        of_segment[n * p.channels] = by_rate[n][threadIdx.x];
        dh[n] = by_state[n][threadIdx.x];
    }
    if (at.s == 0) leave(dh, p, at, 0);
}

// Sums of the parts of gradients, in a fixed order: blockIdx.y = 0 for dB, 1 for dC, 2 for dA, dD and dbias.
template <typename T>
__global__ void add_kernel(const ScanArguments p, const ScanGradients g, int slices) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t rows = static_cast<int64_t>((p.steps + kSteps - 1) / kSteps) * kSteps * kStates;  // of a text, padded
    float sum = 0.0f;
    if (blockIdx.y < 2) {
        const int64_t text = static_cast<int64_t>(p.steps) * kStates, b = i / text;
        if (b >= p.batch) return;
        const float* from = g.of_steps + (blockIdx.y * static_cast<int64_t>(slices) * p.batch + b) * rows + i % text;
        for (int s = 0; s < slices; ++s) sum += from[s * p.batch * rows];
        static_cast<T*>(blockIdx.y == 0 ? g.dB : g.dC)[i] = static_cast<T>(sum);
    } else {
        const int64_t n = i / p.channels, e = i % p.channels;
        if (n >= kSums) return;
        for (int s = 0; s < p.batch * p.segments; ++s) sum += g.of_segments[(s * kSums + n) * p.channels + e];
        (n < kStates ? g.dA[e * kStates + n] : n == kStates ? g.dD[e] : g.dbias[e]) = sum;
    }
}

template <typename T>
void launch_backward(const ScanArguments& p, const ScanGradients& g) {
    const auto stream = static_cast<cudaStream_t>(p.stream);
    const dim3 grid((p.channels + kThreads - 1) / kThreads, p.segments, p.batch);
    if (p.segments > 1) {
        const dim3 shared((p.channels + kGroup - 1) / kGroup, p.segments - 1, p.batch);
        const auto kernel = p.gate != nullptr ? local_kernel<T, true, true> : local_kernel<T, true, false>;
        kernel<<<shared, kThreads, 0, stream>>>(p, g.dy);
    }
    gradient_kernel<T><<<grid, kThreads, 0, stream>>>(p, g);
    const int64_t of_steps = static_cast<int64_t>(p.batch) * p.steps * kStates, of_channels = kSums * int64_t{p.channels};
    const int64_t blocks = (std::max(of_steps, of_channels) + kThreads - 1) / kThreads;
    add_kernel<T><<<dim3(static_cast<unsigned>(blocks), 3), kThreads, 0, stream>>>(p, g, grid.x);
}

}  // namespace

const char* scan_backward(const ScanArguments& p, const ScanGradients& g) {
    return launch_as(p.type, [&](auto zero) { launch_backward<decltype(zero)>(p, g); });
}

}  // namespace jrt
