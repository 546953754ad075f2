#pragma once

#include "launch.h"

namespace jrt {

// Turns the sums of each piece, (pieces, B, H, 153, D) and (pieces, B, H, 153), into the states before each piece, in place,
// starting from the initial state, and writes the state after the last one.
const char* scan_states(const PrefillArguments& arguments, float* piece_S, float* piece_z);

}  // namespace jrt
