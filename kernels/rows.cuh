// Where the rows of a tensor lie in something larger, smaller or broadcast. Twin of src/mask/rows.rs.
#pragma once

#include <cstddef>
#include <cstdint>

// Row r becomes base + sum over g of digit_g(r) * stride[g]; the digits of r are taken in the mixed
// radix `size`, innermost first, and the last one is unbounded. Dimensions whose strides follow from
// one another share a digit: the usual map has a single one, and the first comparison ends it.
struct RowMap {
    uint64_t base;
    uint64_t size[3];
    uint64_t stride[4];

    __device__ __forceinline__ uint64_t map(uint64_t row) const {
        uint64_t mapped = base;
#pragma unroll
        for (int group = 0; group < 3; ++group) {
            if (row < size[group]) return mapped + row * stride[group];
            mapped += row % size[group] * stride[group];
            row /= size[group];
        }
        return mapped + row * stride[3];
    }
};
static_assert(sizeof(RowMap) == 64 && offsetof(RowMap, size) == 8 && offsetof(RowMap, stride) == 32,
              "as src/mask/rows.rs lays it out");
