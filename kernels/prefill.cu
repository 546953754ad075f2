// Host side of the prefill: tensor maps and parameters; and the sums over pieces.
#include "pieces.h"
#include "prefill.cuh"
#include "scan.h"
#include "tensor_maps.h"

namespace jrt {

template <typename Elem>
const char* launch_prefill(const PrefillArguments&, const PrefillMaps&, PrefillParameters);
extern template const char* launch_prefill<__nv_bfloat16>(const PrefillArguments&, const PrefillMaps&, PrefillParameters);
extern template const char* launch_prefill<__half>(const PrefillArguments&, const PrefillMaps&, PrefillParameters);

namespace {

constexpr int kScanThreads = 256;

struct Sums {
    float* pieces;  // (count, elements)
    float* total;   // (elements)
    int64_t elements;
};

// One thread per element of S, then of z; the pieces' values are fetched sixteen at a time. In place: each piece gets the sum
// up to it. Otherwise only the total is written.
template <bool kInPlace>
__global__ void __launch_bounds__(kScanThreads) add_pieces(const Sums S, const Sums z, int count) {
    int64_t element = static_cast<int64_t>(blockIdx.x) * kScanThreads + threadIdx.x;
    const bool in_S = element < S.elements;
    if (!in_S) element -= S.elements;
    float* const pieces = in_S ? S.pieces : z.pieces;
    const int64_t elements = in_S ? S.elements : z.elements;
    if (element >= elements) return;
    float running = 0.0f;
    constexpr int kBatch = 16;
    for (int first = 0; first < count; first += kBatch) {
        float values[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) values[i] = first + i < count ? pieces[(first + i) * elements + element] : 0.0f;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            running += values[i];
            if (kInPlace && first + i > 0 && first + i < count) pieces[(first + i) * elements + element] = running;
        }
    }
    if (!kInPlace) (in_S ? S.total : z.total)[element] = running;
}

template <bool kInPlace>
const char* launch_add_pieces(const PrefillArguments& a, float* piece_S, float* piece_z, int pieces) {
    const int64_t states = static_cast<int64_t>(a.batch) * a.heads * kFeatures;
    const Sums S{piece_S, a.S, states * a.value_dim}, z{piece_z, a.z, states};
    const auto blocks = static_cast<unsigned>((S.elements + z.elements + kScanThreads - 1) / kScanThreads);
    add_pieces<kInPlace><<<blocks, kScanThreads, 0, static_cast<cudaStream_t>(a.stream)>>>(S, z, pieces);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

int column_tiles(int value_dim) { return (value_dim + kColumns - 1) / kColumns; }

}  // namespace

int prefill_pieces(int batch, int tokens, int heads, int value_dim, bool only_state, int multiprocessors) {
    return best_pieces({batch, tokens, heads, column_tiles(value_dim), only_state}, multiprocessors);
}

int64_t prefill_workspace(int batch, int heads, int value_dim, int pieces) {
    return pieces > 1 ? static_cast<int64_t>(pieces) * batch * heads * kFeatures * (value_dim + 1) : 0;
}

const char* scan_pieces(const PrefillArguments& a, float* piece_S, float* piece_z, int pieces) {
    return pieces > 1 ? launch_add_pieces<true>(a, piece_S, piece_z, pieces) : nullptr;
}

const char* sum_pieces(const PrefillArguments& a, float* piece_S, float* piece_z, int pieces) {
    return launch_add_pieces<false>(a, piece_S, piece_z, pieces);
}

const char* prefill(const PrefillArguments& a) {
    PrefillMaps maps{};
    TensorMaps encode(a.type, a.batch, a.tokens, a.heads);
    encode.rows(&maps.k, a.k, kDim, kDim, kChunk);
    encode.rows(&maps.v, a.v, a.value_dim, kColumns, kChunk);
    if (a.q.data != nullptr) {
        encode.rows(&maps.q, a.q, kDim, kDim, kChunk);
        encode.rows(&maps.o, a.o, a.value_dim, kColumns, 16);
    }
    if (encode.error() != nullptr) return encode.error();

    PrefillParameters p{};
    p.mask = a.mask;
    p.mask_batch_stride = a.mask_batch_stride;
    p.tokens = a.tokens, p.heads = a.heads, p.value_dim = a.value_dim;
    p.column_tiles = column_tiles(a.value_dim);
    const int chunks = (a.tokens + kChunk - 1) / kChunk;
    p.pieces = a.pieces;
    p.piece_chunks = (chunks + a.pieces - 1) / a.pieces;
    p.normalize = a.normalize;
    return a.type == ElementType::kBFloat16 ? launch_prefill<__nv_bfloat16>(a, maps, p) : launch_prefill<__half>(a, maps, p);
}

}  // namespace jrt
