/* Vectors of float32: one name for an operation whatever the processor. Each operation rounds every lane as IEEE 754 says,
 * so the width of a vector cannot be seen in a result.
 *
 * LANES numbers are a `vf`. NEGATIVE(a, yes, no): a lane of `yes` where a < 0. MAX(a, b): a > b ? a : b, so b where one is
 * NaN. ROUND: to the nearest whole number, ties to even. POWER_OF_TWO(n): of whole numbers -126 … 127, anything elsewhere.
 * UNLESS_BELOW(x, least, v): 0 where x < least, else v. LOW_HALF, HIGH_HALF: the bfloat16 numbers in the lower and upper
 * halves of words. STORE_WHOLE: rounded like ROUND, to int32; anything for what is beyond that, or NaN. */
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#if defined(__aarch64__)
#include "vectors_neon.h"
#else
#include "vectors_x86.h"
#endif
