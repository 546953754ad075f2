// Host side of the backward kernels.
#include "backward_keys.cuh"
#include "backward_queries.cuh"
#include "backward_sums.cuh"
#include "tensor_maps.h"

namespace jrt {
namespace {

const char* failure(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

template <typename Kernel>
const char* launch(Kernel kernel, int threads, uint32_t shared_bytes, const BackwardArguments& a) {
    const TensorView o{a.o, static_cast<int64_t>(a.tokens) * a.heads * a.value_dim, static_cast<int64_t>(a.heads) * a.value_dim,
                       a.value_dim};
    TensorView dv = o;
    dv.data = a.dv;
    BackwardMaps maps{};
    TensorMaps encode(ElementType::kBFloat16, a.batch, a.tokens, a.heads);
    encode.rows(&maps.k, a.k, kDim, kDim, kChunk);
    encode.rows(&maps.v, a.v, a.value_dim, kColumns, kChunk);
    if (a.q.data != nullptr) encode.rows(&maps.q, a.q, kDim, kDim, kChunk);
    if (a.dout.data != nullptr) encode.rows(&maps.dout, a.dout, a.value_dim, kColumns, kChunk);
    if (a.o != nullptr) encode.rows(&maps.o, o, a.value_dim, kColumns, kChunk);
    if (a.dv != nullptr) encode.rows(&maps.dv, dv, a.value_dim, kColumns, 16);
    if (encode.error() != nullptr) return encode.error();

    BackwardParameters p{};
    p.mask = a.mask, p.mask_batch_stride = a.mask_batch_stride;
    p.S = a.S, p.z = a.z;
    p.o = static_cast<const Bf16*>(a.o);
    p.dout = a.dout;
    p.dx = a.dx;
    p.w = a.w, p.c = a.c;
    p.out_S = a.out_S, p.out_z = a.out_z;
    p.batch = a.batch, p.tokens = a.tokens, p.heads = a.heads, p.value_dim = a.value_dim;
    p.column_tiles = (a.value_dim + kColumns - 1) / kColumns;
    p.pieces = a.pieces, p.piece_chunks = a.piece_tokens / kChunk;
    p.normalize = a.normalize;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return failure(error);
    const unsigned blocks = static_cast<unsigned>(p.column_tiles) * a.heads * a.pieces * a.batch;
    kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(a.stream)>>>(maps, p);
    return failure(cudaGetLastError());
}

}  // namespace

const char* backward_queries(const BackwardArguments& a) {
    return launch(a.mask ? backward_queries<true> : backward_queries<false>, kBackwardThreads, kQuerySharedBytes, a);
}

const char* backward_keys(const BackwardArguments& a) {
    const bool text = a.q.data != nullptr;
    const auto kernel = text ? (a.mask ? backward_keys<true, true> : backward_keys<true, false>)
                             : (a.mask ? backward_keys<false, true> : backward_keys<false, false>);
    return launch(kernel, kBackwardThreads, kKeysSharedBytes, a);
}

const char* backward_sums(const BackwardArguments& a, bool of_queries) {
    const auto keys = a.mask ? backward_sums<false, true> : backward_sums<false, false>;
    return launch(of_queries ? backward_sums<true, false> : keys, kWarpgroup, kSumSharedBytes, a);
}

}  // namespace jrt
