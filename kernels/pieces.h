// Into how many pieces a sequence is cut, when it has too few heads to fill the card.
#pragma once

#include <cstdint>

namespace jrt {

struct PrefillShape {
    int batch, tokens, heads;
    int column_tiles;  // of v
    bool only_state;   // a prefix: no queries
};

// The number of pieces that a model of the passes' times likes best. No piece is empty.
int best_pieces(const PrefillShape& shape, int multiprocessors);

}  // namespace jrt
