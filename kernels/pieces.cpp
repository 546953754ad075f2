// A model of how long the passes over a sequence take. Its constants are fitted to up to 18 numbers of pieces at 59 shapes
// (benchmarks/kernel_pieces.py); only their ratios matter here.
#include "pieces.h"

#include <algorithm>

namespace jrt {
namespace {

constexpr int kChunk = 64;                  // tokens
constexpr double kBytesPerMicrosecond = 2.85e6;
constexpr double kStateHandedOver = 0.045;  // microseconds to write or read one state of one head

struct Pass {
    double start;                     // microseconds
    int blocks_a_multiprocessor;
    double chunk[3];                  // microseconds of a chunk with so many blocks, less one, on the multiprocessor
    double chunk_bytes;
};
constexpr Pass kText{6.5, 2, {1.18, 1.97, 0}, kChunk * 320.0};
constexpr Pass kState{5.5, 3, {0.59, 0.90, 1.20}, kChunk * 160.0};

// Blocks that run at once advance by one chunk: as fast as a multiprocessor or as the memory allows.
double wave(const Pass& pass, int64_t blocks, int multiprocessors) {
    if (blocks == 0) return 0;
    const int64_t crowd = (blocks + multiprocessors - 1) / multiprocessors;
    return std::max(pass.chunk[crowd - 1], blocks * pass.chunk_bytes / kBytesPerMicrosecond);
}

double microseconds(const Pass& pass, int64_t blocks, int chunks, int multiprocessors) {
    const int64_t slots = pass.blocks_a_multiprocessor * multiprocessors;
    return pass.start + chunks * (blocks / slots * wave(pass, slots, multiprocessors) + wave(pass, blocks % slots, multiprocessors));
}

double microseconds(const PrefillShape& shape, int pieces, int piece_chunks, int multiprocessors) {
    const int64_t blocks = static_cast<int64_t>(shape.batch) * shape.heads * shape.column_tiles;
    const auto pass = [&](const Pass& which, int64_t count) {
        return microseconds(which, blocks * count, piece_chunks, multiprocessors);
    };
    if (shape.only_state) return pass(kState, pieces) + (pieces > 1 ? kStateHandedOver * blocks * pieces : 0);
    if (pieces == 1) return pass(kText, 1);
    const int handed_over = pieces == 2 ? 1 : 2 * (pieces - 1);  // two pieces need no sum
    return pass(kText, pieces) + pass(kState, pieces - 1) + kStateHandedOver * blocks * handed_over;
}

}  // namespace

int best_pieces(const PrefillShape& shape, int multiprocessors) {
    const int64_t blocks = static_cast<int64_t>(shape.batch) * shape.heads * shape.column_tiles;
    const int chunks = (shape.tokens - 1) / kChunk + 1;
    const int64_t most = std::min<int64_t>(chunks / 2, 1 + 4 * multiprocessors / blocks);
    int best = 1;
    double least = microseconds(shape, 1, chunks, multiprocessors);
    for (int wanted = 2; wanted <= most; ++wanted) {
        const int piece_chunks = (chunks - 1) / wanted + 1;
        const int pieces = (chunks - 1) / piece_chunks + 1;
        const double time = microseconds(shape, pieces, piece_chunks, multiprocessors);
        if (time < least) least = time, best = pieces;
    }
    return best;
}

}  // namespace jrt
