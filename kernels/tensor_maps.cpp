#include "tensor_maps.h"

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

namespace jrt {
namespace {

PFN_cuTensorMapEncodeTiled_v12000 encoder() {
    static const auto found = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult result;
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
        return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
    }();
    return found;
}

}  // namespace

TensorMaps::TensorMaps(ElementType type, int batch, int tokens, int heads)
    : type_(type == ElementType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16),
      batch_(batch), tokens_(tokens), heads_(heads),
      error_(encoder() == nullptr ? "the driver has no cuTensorMapEncodeTiled: CUDA 12 or newer is needed" : nullptr) {}

void TensorMaps::rows(CUtensorMap* map, const TensorView& x, int last, int columns, int rows) {
    if (error_ != nullptr) return;
    const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(last), static_cast<cuuint64_t>(heads_),
                                 static_cast<cuuint64_t>(tokens_), static_cast<cuuint64_t>(batch_)};
    // The stride of a dimension of size 1 is arbitrary in the caller's tensor but not in a map.
    const auto bytes = [](int64_t stride, int size) { return static_cast<cuuint64_t>(size > 1 ? stride * 2 : 16); };
    const cuuint64_t strides[3] = {bytes(x.head_stride, heads_), bytes(x.token_stride, tokens_), bytes(x.batch_stride, batch_)};
    const cuuint32_t box[4] = {static_cast<cuuint32_t>(columns), 1, static_cast<cuuint32_t>(rows), 1};
    const cuuint32_t steps[4] = {1, 1, 1, 1};
    const auto swizzle = columns * 2 == 32 ? CU_TENSOR_MAP_SWIZZLE_32B : CU_TENSOR_MAP_SWIZZLE_128B;
    const CUresult result = encoder()(map, type_, 4, const_cast<void*>(x.data), sizes, strides, box, steps,
                                      CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                                      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) error_ = "a tensor cannot be copied in tiles: its address and strides must be multiples of 16 bytes";
}

}  // namespace jrt
