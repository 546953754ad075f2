#pragma once

#include "launch.h"

namespace jrt {

// Both take the states after each piece as if nothing stood before it (the first: with the initial state), (pieces, B, H, 153, D)
// and (pieces, B, H, 153), and queue their work on the stream.

// Adds to each the ones before it, in place.
const char* scan_pieces(const PrefillArguments& arguments, float* piece_S, float* piece_z, int pieces);

// Writes the sum of all to the final state.
const char* sum_pieces(const PrefillArguments& arguments, float* piece_S, float* piece_z, int pieces);

}  // namespace jrt
