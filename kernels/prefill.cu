// Host side of the prefill: tensor maps, checks; and the sums over pieces.
#include <cudaTypedefs.h>

#include <algorithm>
#include <string>

#include "pieces.h"
#include "prefill.cuh"
#include "scan.h"

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

PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
    static const auto encoder = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
        return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
    }();
    return encoder;
}

// A map of (B, T, H, last) that copies `rows` tokens x `columns` of one head.
bool encode(CUtensorMap* map, const TensorView& x, const PrefillArguments& a, int last, int columns, int rows,
            CUtensorMapSwizzle swizzle) {
    const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(last), static_cast<cuuint64_t>(a.heads),
                                 static_cast<cuuint64_t>(a.tokens), static_cast<cuuint64_t>(a.batch)};
    // The stride of a dimension of size 1 is arbitrary in the caller's tensor but not in a map.
    const auto bytes = [&](int64_t stride, int size) { return static_cast<cuuint64_t>(size > 1 ? stride * 2 : 16); };
    const cuuint64_t strides[3] = {bytes(x.head_stride, a.heads), bytes(x.token_stride, a.tokens), bytes(x.batch_stride, a.batch)};
    const cuuint32_t box[4] = {static_cast<cuuint32_t>(columns), 1, static_cast<cuuint32_t>(rows), 1};
    const cuuint32_t steps[4] = {1, 1, 1, 1};
    const auto type = a.type == ElementType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    return tensor_map_encoder()(map, type, 4, const_cast<void*>(x.data), sizes, strides, box, steps,
                                CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

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
    if (tensor_map_encoder() == nullptr) return "the driver has no cuTensorMapEncodeTiled: CUDA 12 or newer is needed";
    PrefillMaps maps{};
    const auto rows32 = CU_TENSOR_MAP_SWIZZLE_32B, rows128 = CU_TENSOR_MAP_SWIZZLE_128B;
    bool ok = encode(&maps.k, a.k, a, kDim, kDim, kChunk, rows32) &&
              encode(&maps.v, a.v, a, a.value_dim, kColumns, kChunk, rows128);
    if (a.q.data != nullptr) {
        ok = ok && encode(&maps.q, a.q, a, kDim, kDim, kChunk, rows32) &&
             encode(&maps.o, a.o, a, a.value_dim, kColumns, 16, rows128);
    }
    if (!ok) return "a tensor cannot be copied in tiles: its address and strides must be multiples of 16 bytes";

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
