// One token of decoding: S += phi(k) v^T and z += phi(k), in place or not, o = phi(q) S / phi(q) z. All arithmetic in fp32.
//
// The state is read and written once and nothing else is large, so this is a memory-bound kernel: a block takes one head, 64
// columns of v at a time, and every thread has all its loads in flight before it needs the first.
#include "features.cuh"
#include "hopper.cuh"
#include "launch.h"

namespace jrt {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 64;
constexpr int kVectors = kColumns / 4;        // threads side by side on a row of S, 4 columns each
constexpr int kRows = kThreads / kVectors;    // rows of S in flight
constexpr int kRowsPerThread = (kFeatures + kRows - 1) / kRows;

struct DecodeParameters {
    const void *q, *k, *v;
    void* o;
    int64_t q_batch, q_head, k_batch, k_head, v_batch, v_head, o_batch, o_head;  // strides
    const uint8_t* mask;
    int64_t mask_batch;
    const float *old_S, *old_z;  // nullptr: zero
    float *S, *z;
    int heads, value_dim, normalize;
};

template <typename Elem>
__device__ __forceinline__ float to_float(const void* data, int64_t index) {
    return static_cast<float>(static_cast<const Elem*>(data)[index]);
}

// phi(x)[feature] in the documented order.
__device__ __forceinline__ float taylor_feature(const float* x, int feature) {
    if (feature == 0) return 1.0f;
    if (feature <= kDim) return kFirstScale * x[feature - 1];
    int i = 0, rest = feature - 1 - kDim;
    while (rest >= kDim - i) rest -= kDim - i, ++i;
    return (rest == 0 ? kSquareScale : kPairScale) * x[i] * x[i + rest];
}

// kValueDim: D where it is known when compiling, so that addresses are immediate; 0: any.
template <typename Elem, int kValueDim>
__global__ void __launch_bounds__(kThreads, kValueDim == 64 ? 3 : 2) decode_kernel(const DecodeParameters p) {
    __shared__ float q[kDim], k[kDim], phi_q[kFeatures], phi_k[kFeatures];
    __shared__ float4 sums[kThreads / 32][kVectors];
    __shared__ float shares[kThreads / 32];
    const int batch = blockIdx.x / p.heads, head = blockIdx.x % p.heads, thread = threadIdx.x;
    const int warp = thread / 32, lane = thread % 32;
    const int first_row = thread / kVectors;
    const int64_t state = blockIdx.x;
    const int value_dim = kValueDim ? kValueDim : p.value_dim;
    const int64_t offset = state * kFeatures * value_dim;
    const bool fresh = p.old_S == nullptr;
    const bool counts = p.mask == nullptr || p.mask[batch * p.mask_batch] != 0;

    float4 rows[kRowsPerThread];
    float v[4];
    const auto fetch = [&](int column) {  // columns column .. column + 3; value_dim is a multiple of 4
#pragma unroll
        for (int r = 0; r < kRowsPerThread; ++r) {
            const int row = first_row + r * kRows;
            rows[r] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (!fresh && row < kFeatures && column < value_dim) {
                rows[r] = __ldcs(reinterpret_cast<const float4*>(p.old_S + offset + row * value_dim + column));
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            v[i] = column < value_dim ? to_float<Elem>(p.v, batch * p.v_batch + head * p.v_head + column + i) : 0.0f;
        }
    };

    // phi(q), phi(k) and the denominator, while the first columns are on their way.
    fetch(4 * (thread % kVectors));
    const float old_z = !fresh && thread < kFeatures ? p.old_z[state * kFeatures + thread] : 0.0f;
    if (thread < kDim) {
        q[thread] = to_float<Elem>(p.q, batch * p.q_batch + head * p.q_head + thread);
    } else if (thread < 2 * kDim) {
        k[thread - kDim] = to_float<Elem>(p.k, batch * p.k_batch + head * p.k_head + thread - kDim);
    }
    __syncthreads();
    float share = 0.0f;  // of phi(q).z
    if (thread < kFeatures) {
        const float feature_q = taylor_feature(q, thread), feature_k = counts ? taylor_feature(k, thread) : 0.0f;
        phi_q[thread] = feature_q, phi_k[thread] = feature_k;
        p.z[state * kFeatures + thread] = old_z + feature_k;
        share = feature_q * (old_z + feature_k);
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) share += __shfl_xor_sync(~0u, share, lanes);
    if (lane == 0) shares[warp] = share;
    __syncthreads();

    for (int tile = 0; tile < value_dim; tile += kColumns) {
        const int column = tile + 4 * (thread % kVectors);
        if (tile > 0) fetch(column);
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int r = 0; r < kRowsPerThread; ++r) {
            const int row = first_row + r * kRows;
            if (row < kFeatures && column < value_dim) {
                const float a = phi_k[row], b = phi_q[row];
                float4 x = rows[r];
                x.x = fmaf(a, v[0], x.x), x.y = fmaf(a, v[1], x.y), x.z = fmaf(a, v[2], x.z), x.w = fmaf(a, v[3], x.w);
                __stcs(reinterpret_cast<float4*>(p.S + offset + row * value_dim + column), x);
                sum.x = fmaf(b, x.x, sum.x), sum.y = fmaf(b, x.y, sum.y);
                sum.z = fmaf(b, x.z, sum.z), sum.w = fmaf(b, x.w, sum.w);
            }
        }
        // Sum over the rows: two per warp, then over warps.
        sum.x += __shfl_xor_sync(~0u, sum.x, 16), sum.y += __shfl_xor_sync(~0u, sum.y, 16);
        sum.z += __shfl_xor_sync(~0u, sum.z, 16), sum.w += __shfl_xor_sync(~0u, sum.w, 16);
        if (lane < kVectors) sums[warp][lane] = sum;
        __syncthreads();
        if (thread < kColumns && tile + thread < value_dim) {
            float numerator = 0.0f, denominator = 0.0f;
#pragma unroll
            for (int w = 0; w < kThreads / 32; ++w) {
                numerator += reinterpret_cast<const float*>(sums[w])[thread];
                denominator += shares[w];
            }
            if (p.normalize && denominator != 0.0f) numerator /= denominator;
            static_cast<Elem*>(p.o)[batch * p.o_batch + head * p.o_head + tile + thread] = static_cast<Elem>(numerator);
        }
        __syncthreads();
    }
}

template <typename Elem>
auto decode_kernel_for(int value_dim) {
    switch (value_dim) {
        case 64: return decode_kernel<Elem, 64>;
        case 112: return decode_kernel<Elem, 112>;
        case 128: return decode_kernel<Elem, 128>;
        default: return decode_kernel<Elem, 0>;
    }
}

}  // namespace

const char* decode_step(const DecodeArguments& a) {
    const DecodeParameters p{a.q.data,         a.k.data,         a.v.data,         const_cast<void*>(a.o.data),
                             a.q.batch_stride, a.q.head_stride,  a.k.batch_stride, a.k.head_stride,
                             a.v.batch_stride, a.v.head_stride,  a.o.batch_stride, a.o.head_stride,
                             a.mask,           a.mask_batch_stride, a.old_S,       a.old_z,
                             a.S,              a.z,              a.heads,          a.value_dim,
                             a.normalize};
    const unsigned blocks = static_cast<unsigned>(a.batch) * a.heads;
    const auto launch = [&](auto kernel) { kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(a.stream)>>>(p); };
    if (a.type == ElementType::kBFloat16) {
        launch(decode_kernel_for<__nv_bfloat16>(a.value_dim));
    } else {
        launch(decode_kernel_for<__half>(a.value_dim));
    }
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace jrt
