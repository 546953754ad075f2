// Launches the passes of a prefill for one element type.
#pragma once

#include "prefill.cuh"
#include "scan.h"

namespace jrt {

inline const char* failure(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

template <typename Kernel>
const char* launch_blocks(Kernel kernel, int threads, uint32_t shared_bytes, const PrefillArguments& a, const PrefillMaps& maps,
                          const PrefillParameters& p) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return failure(error);
    const unsigned blocks = static_cast<unsigned>(p.column_tiles) * a.heads * p.pieces * a.batch;
    kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(a.stream)>>>(maps, p);
    return failure(cudaGetLastError());
}

// `p` comes with sizes, mask and pieces filled in; the states are set here, pass by pass.
template <typename Elem>
const char* launch_prefill(const PrefillArguments& a, const PrefillMaps& maps, PrefillParameters p) {
    const auto text = a.mask ? prefill_text<Elem, true> : prefill_text<Elem, false>;
    const auto state = a.mask ? prefill_state<Elem, true> : prefill_state<Elem, false>;
    const bool only_state = a.q.data == nullptr;
    const int64_t states = static_cast<int64_t>(a.batch) * a.heads;
    p.initial_S = a.initial_S, p.initial_z = a.initial_z;
    p.S = a.S, p.z = a.z;
    p.initial_piece_stride = p.piece_stride = 0;
    p.last_piece_only = 1;

    if (a.segments > 1) {
        PrefillParameters first = p;
        float* const piece_S = a.workspace;
        float* const piece_z = piece_S + a.segments * states * kFeatures * a.value_dim;
        first.initial_S = first.initial_z = nullptr;
        first.S = piece_S, first.z = piece_z;
        first.piece_stride = states;
        first.last_piece_only = 0;
        if (const char* error = launch_blocks(state, kWarpgroup, kStateSharedBytes, a, maps, first)) return error;
        if (const char* error = scan_states(a, piece_S, piece_z)) return error;
        if (only_state) return nullptr;
        p.initial_S = piece_S, p.initial_z = piece_z;
        p.initial_piece_stride = states;
    } else if (only_state) {
        return launch_blocks(state, kWarpgroup, kStateSharedBytes, a, maps, p);
    }
    return launch_blocks(text, 2 * kWarpgroup, kTextSharedBytes, a, maps, p);
}

}  // namespace jrt
