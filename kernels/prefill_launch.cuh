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
    p.initial_S = a.initial_S, p.initial_z = a.initial_z;
    p.before_S = p.before_z = nullptr;
    p.S = a.S, p.z = a.z;
    p.states = static_cast<int64_t>(a.batch) * a.heads;
    p.piece_stride = 0;
    p.last_piece_only = 1;
    if (a.pieces == 1) {
        return only_state ? launch_blocks(state, kWarpgroup, kStateSharedBytes, a, maps, p)
                          : launch_blocks(text, 2 * kWarpgroup, kTextSharedBytes, a, maps, p);
    }

    PrefillParameters first = p;
    first.pieces = only_state ? a.pieces : a.pieces - 1;  // the last piece's text ends in the final state
    first.S = a.workspace;
    first.z = a.workspace + first.pieces * p.states * kFeatures * a.value_dim;
    first.piece_stride = p.states;
    first.last_piece_only = 0;
    if (const char* error = launch_blocks(state, kWarpgroup, kStateSharedBytes, a, maps, first)) return error;
    if (only_state) return sum_pieces(a, first.S, first.z, first.pieces);
    if (const char* error = scan_pieces(a, first.S, first.z, first.pieces)) return error;
    p.before_S = first.S, p.before_z = first.z;
    return launch_blocks(text, 2 * kWarpgroup, kTextSharedBytes, a, maps, p);
}

}  // namespace jrt
