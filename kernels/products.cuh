// Matrix products on the tensor cores: one warp (mma) and one warpgroup (wgmma), in bf16 and fp16 with fp32 sums.
#pragma once

#include "hopper.cuh"

// The text of an instruction and its operands, written once for both types and all shapes.
#define JRT_SUMS_32 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define JRT_SUMS_40 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    " %32, %33, %34, %35, %36, %37, %38, %39}"
#define JRT_SUMS_80 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    " %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79}"
#define JRT_OPERANDS_8(d, i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define JRT_OPERANDS_32(d) JRT_OPERANDS_8(d, 0), JRT_OPERANDS_8(d, 8), JRT_OPERANDS_8(d, 16), JRT_OPERANDS_8(d, 24)
#define JRT_OPERANDS_40(d) JRT_OPERANDS_32(d), JRT_OPERANDS_8(d, 32)
#define JRT_OPERANDS_80(d)                                                                                    \
    JRT_OPERANDS_32(d), JRT_OPERANDS_8(d, 32), JRT_OPERANDS_8(d, 40), JRT_OPERANDS_8(d, 48), JRT_OPERANDS_8(d, 56), \
        JRT_OPERANDS_8(d, 64), JRT_OPERANDS_8(d, 72)
// accumulate: the operand that says whether the sums start at 0; modifiers: signs of A and B, then which is transposed.
#define JRT_WGMMA(shape, type, sums, sources, accumulate, modifiers)                                          \
    "{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate ", 0;\n"                                                  \
    "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " " sums ", " sources ", p, " modifiers ";\n}\n"
// TEXT is a macro of the type's name; what follows are the operands of asm.
#define JRT_ASM_OF_TYPE(Elem, TEXT, ...)                              \
    if constexpr (std::is_same<Elem, __nv_bfloat16>::value) {         \
        asm volatile(TEXT("bf16") __VA_ARGS__);                       \
    } else {                                                          \
        asm volatile(TEXT("f16") __VA_ARGS__);                        \
    }

namespace jrt {

// D (16 x 8, fp32) += A (16 x 16) B (16 x 8), one warp.
template <typename Elem>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define TEXT(type)                                                                                                  \
    "mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, " \
    "{%0, %1, %2, %3};"
    JRT_ASM_OF_TYPE(Elem, TEXT, : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
#undef TEXT
}

// Scores = Q K^T: A (64 queries x 16 dims) and B (64 keys x 16 dims), both K-major in shared memory. Also 16 columns of
// dP = dO V^T.
template <typename Elem>
__device__ __forceinline__ void wgmma_scores(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
#define TEXT(type) JRT_WGMMA("m64n64k16", type, JRT_SUMS_32, "%32, %33", "%34", "1, 1, 0, 0")
    JRT_ASM_OF_TYPE(Elem, TEXT, : JRT_OPERANDS_32(d) : "l"(a), "l"(b), "r"(accumulate))
#undef TEXT
}

// O += phi(q) S: A from registers, B = S (64 columns of v x 16 features), K-major in shared memory.
template <typename Elem>
__device__ __forceinline__ void wgmma_state_read(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate) {
#define TEXT(type) JRT_WGMMA("m64n64k16", type, JRT_SUMS_32, "{%32, %33, %34, %35}, %36", "%37", "1, 1, 0")
    JRT_ASM_OF_TYPE(Elem, TEXT, : JRT_OPERANDS_32(d)
                    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))
#undef TEXT
}

// O += P V: A from registers, B = V (16 tokens x 64 columns), MN-major in shared memory.
template <typename Elem>
__device__ __forceinline__ void wgmma_values(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate) {
#define TEXT(type) JRT_WGMMA("m64n64k16", type, JRT_SUMS_32, "{%32, %33, %34, %35}, %36", "%37", "1, 1, 1")
    JRT_ASM_OF_TYPE(Elem, TEXT, : JRT_OPERANDS_32(d)
                    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))
#undef TEXT
}

// dphi += X S^T, for five slabs of features: A = X (64 tokens x 16 columns of v), K-major; B = S^T (16 columns of v x 80
// features), MN-major; both in shared memory.
template <typename Elem>
__device__ __forceinline__ void wgmma_feature_gradients(float (&d)[40], uint64_t a, uint64_t b, int accumulate) {
#define TEXT(type) JRT_WGMMA("m64n80k16", type, JRT_SUMS_40, "%40, %41", "%42", "1, 1, 0, 1")
    JRT_ASM_OF_TYPE(Elem, TEXT, : JRT_OPERANDS_40(d) : "l"(a), "l"(b), "r"(accumulate))
#undef TEXT
}

// S^T += V^T phi(k): A = V (16 tokens x 64), B = phi(k) (16 tokens x 160), both MN-major in shared memory.
template <typename Elem>
__device__ __forceinline__ void wgmma_state_update(float (&d)[80], uint64_t a, uint64_t b, int accumulate) {
#define TEXT(type) JRT_WGMMA("m64n160k16", type, JRT_SUMS_80, "%80, %81", "%82", "1, 1, 1, 1")
    JRT_ASM_OF_TYPE(Elem, TEXT, : JRT_OPERANDS_80(d) : "l"(a), "l"(b), "r"(accumulate))
#undef TEXT
}

}  // namespace jrt
