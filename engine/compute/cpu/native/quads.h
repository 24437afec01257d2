/* Multiply and add quads: four bytes of an input with four of each column. One name whatever the processor.
 *
 * COLUMNS of the result are a `vi` of sums, which begin at SUM_START. QUADS(p): weights of COLUMNS columns. INPUT(p): the same
 * quad of an input for all, which put_quad has laid out. WHOLE_COLUMNS: whether a lane is a column's sum, or half of it. */
#pragma once
#include "vectors.h"

#if defined(__aarch64__)
#include "quads_neon.h"
#else
#include "quads_x86.h"
#endif
