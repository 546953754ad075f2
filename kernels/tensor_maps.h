// Tensor maps: how the copy engine finds tiles of tokens in (B, T, H, last).
#pragma once

#include <cuda.h>

#include "launch.h"

namespace jrt {

// Encodes maps of tensors of one call, which have the same B, T and H.
class TensorMaps {
  public:
    TensorMaps(ElementType type, int batch, int tokens, int heads);

    // A map that copies `rows` tokens x `columns` of one head; rows and columns past the end are zero. The rows in shared
    // memory have 32 or 128 bytes and are swizzled over their length.
    void rows(CUtensorMap* map, const TensorView& x, int last, int columns, int rows);

    // nullptr, or what went wrong.
    const char* error() const { return error_; }

  private:
    CUtensorMapDataType type_;
    int batch_, tokens_, heads_;
    const char* error_;
};

}  // namespace jrt
