// Two frozen linear layers one behind the other: what lies between them is left in the order in which the second reads it.
#pragma once

#include <cstdint>

#include "tlfast.h"

namespace TL_ISA {

// y = second(activation(first(x))) in bfloat16, rows contiguous. between: memory for a whole number of 16 rows.
int linear_pair(const tl_linear &first, const tl_linear &second, const void *x, void *between, void *y, int64_t rows,
                int activation, int threads);

}  // namespace TL_ISA
