// What must be inlined for the loop around it to vectorise, or for what it captures to stay in registers.
#pragma once

#define TL_INLINE __attribute__((always_inline))
