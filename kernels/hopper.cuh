// Thin names for the Hopper (sm_90a) instructions the kernels use: mbarriers, tensor-map copies, wgmma, matrix moves.
// Nothing here knows about attention. PTX ISA 8.0 and later; addresses are 32-bit shared-memory addresses.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace jrt {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- mbarrier --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// By one thread, or by a whole warp: `mbarrier_wait_warp`.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra DONE;\n"
        "bra WAIT;\n"
        "DONE:\n}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Lanes may leave the loop at different tries, and what follows (wgmma, named barriers) takes a warp as one.
__device__ __forceinline__ void mbarrier_wait_warp(uint32_t barrier, uint32_t parity) {
    mbarrier_wait(barrier, parity);
    __syncwarp();
}

// ---- ordering --------------------------------------------------------------------------------------------------------

// Makes this thread's ordinary shared-memory writes visible to the tensor cores and the copy engine.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Named barrier of kThreads threads.
template <int kThreads>
__device__ __forceinline__ void barrier_wait(int id) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

template <int kThreads>
__device__ __forceinline__ void barrier_arrive(int id) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

// ---- registers: one warpgroup gives some up, another takes them; the numbers are per thread afterwards ------------------

template <int kCount>
__device__ __forceinline__ void release_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void acquire_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- tensor-map copies -----------------------------------------------------------------------------------------------

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Coordinates are (column, head, token, batch), innermost first.
__device__ __forceinline__ void copy_tile_in(uint32_t destination, const CUtensorMap* map, uint32_t barrier, int column,
                                             int head, int token, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
        ::"r"(destination),
        "l"(map), "r"(barrier), "r"(column), "r"(head), "r"(token), "r"(batch)
        : "memory");
}

__device__ __forceinline__ void copy_tile_out(const CUtensorMap* map, uint32_t source, int column, int head, int token,
                                              int batch) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
                 "r"(source), "r"(column), "r"(head), "r"(token), "r"(batch)
                 : "memory");
}

__device__ __forceinline__ void copy_out_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// The source buffers of all committed stores may be written again.
__device__ __forceinline__ void copy_out_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

__device__ __forceinline__ void copy_out_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// ---- matrix moves between registers and shared memory ----------------------------------------------------------------

__device__ __forceinline__ void store_matrix_x4(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
    uint4 r;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
                 : "r"(address)
                 : "memory");
    return r;
}

__device__ __forceinline__ uint2 load_shared_8(uint32_t address) {
    uint2 r;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(r.x), "=r"(r.y) : "r"(address) : "memory");
    return r;
}

__device__ __forceinline__ float load_shared_float(uint32_t address) {
    float r;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(r) : "r"(address) : "memory");
    return r;
}

__device__ __forceinline__ void store_shared_16(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

__device__ __forceinline__ void store_shared_word(uint32_t address, uint32_t value) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ void store_shared_float(uint32_t address, float value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

// ---- packed 16-bit arithmetic ----------------------------------------------------------------------------------------

template <typename Elem>
__device__ __forceinline__ uint32_t multiply2(uint32_t a, uint32_t b) {
    uint32_t r;
    if constexpr (std::is_same<Elem, __nv_bfloat16>::value) {
        asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    } else {
        asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    }
    return r;
}

template <typename Elem>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
    uint32_t r;
    if constexpr (std::is_same<Elem, __nv_bfloat16>::value) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    }
    return r;
}

template <typename Elem>
__device__ __forceinline__ float2 unpack2(uint32_t pair) {
    if constexpr (std::is_same<Elem, __nv_bfloat16>::value) {
        return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
    } else {
        return __half22float2(*reinterpret_cast<const __half2*>(&pair));
    }
}

// 1 / x to one unit in the last place.
__device__ __forceinline__ float reciprocal(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// The same value in every lane, and the compiler knows it.
__device__ __forceinline__ int warp_uniform(int value) { return __shfl_sync(~0u, value, 0); }

// (low half of a's high word, high half of b's low word): the pair that straddles two neighbouring pairs.
__device__ __forceinline__ uint32_t straddle2(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5432); }

// ---- tensor cores ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

enum class Swizzle : uint32_t { k128 = 1, k32 = 3 };

// Shared-memory matrix descriptor, `offset` bytes further on. K-major: `stride` is the distance between groups of 8 rows,
// `leading` is not used. MN-major: `stride` is the distance between groups of 8 k, `leading` the one between swizzle atoms
// along M or N. Bytes. The two halves are put together so that only the lower one is computed at run time.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, uint32_t offset, uint32_t leading, uint32_t stride,
                                                      Swizzle swizzle) {
    const uint32_t low = ((address + offset) >> 4) | (leading >> 4) << 16;  // shared addresses have 18 bits
    const uint32_t high = (stride >> 4) | static_cast<uint32_t>(swizzle) << 30;
    return static_cast<uint64_t>(high) << 32 | low;
}

}  // namespace jrt
