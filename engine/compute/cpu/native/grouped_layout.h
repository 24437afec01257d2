/* Where the parts of a weight in groups lie (engine.compute.whole.groups.Groups), and of an input that is multiplied with it.
 *
 * A weight stands in panels of PANEL_G columns, each one stream of bytes: chunks of 256 k's, the last one shorter. A chunk
 * is, for its groups, scales, their super-scales, minima, their super-scales, zeros ([groups][PANEL_G] each, as they came),
 * then the numbers of its blocks (32 k's of two vectors of columns). That is the order in which they are read: whatever
 * fetches ahead, a processor by itself or `PREFETCH`, sees one stream without a step back.
 *
 * A vector of a block is 8 quads, four k's each: with 8 bits one after the other; else quads 2i and 2i + 1 share 4 vectors'
 * low and high nibbles. The fifth bits of quad j are bit j of one more vector; the fifth and sixth bits of quad j stand in
 * two more vectors, of which each has four quads. */
#pragma once
#include "grouped_vectors.h"

enum {
    NONE = 0, F16 = 1, BF16 = 2, F32 = 3, U8 = 4, S8 = 5, /* kinds of a part */
    STEP_K = 32,                     /* k's of a block: one step of a number's chain, or two where groups have 16 */
    STEP_QUADS = STEP_K / 4,
    CHUNK_K = 256,
    MOST_GROUPS = CHUNK_K / 16,      /* of a chunk */
    PANEL_G = 2 * WIDTH,             /* columns of a panel */
    QUAD_VECTOR = WIDTH * 4,         /* bytes of a quad of a vector of columns */
    AHEAD_G = 4096,                  /* bytes from what is read to what is fetched */
    FACTS = 7                        /* numbers that go with a block of a row's input: see `grouped_tile` */
};

/* Where the parts of a chunk begin, in bytes, and how many groups and super-groups it has. */
typedef struct {
    size_t scales, supers, minima, minimum_supers, zeros, numbers, bytes;
    long groups, super_groups;
} Chunk;

INLINE long steps_of(long depth) { return (depth + STEP_K - 1) / STEP_K; }
INLINE size_t part_size(int kind) { return kind == NONE ? 0 : kind == F32 ? 4 : kind >= U8 ? 1 : 2; }
INLINE size_t vector_bytes(int bits) { return (size_t)QUAD_VECTOR * bits; } /* of a vector of a block: 32 k's, so bits · 4 */

/* The layout of a chunk of `depth` k's, CHUNK_K at most. */
static Chunk chunk_of(const Format *f, long depth) {
    Chunk c;
    long per = (long)f->group * f->per;
    c.groups = (depth + f->group - 1) / f->group;
    c.super_groups = (depth + per - 1) / per;
    c.scales = 0;
    c.supers = c.scales + (size_t)c.groups * PANEL_G * part_size(f->scales);
    c.minima = c.supers + (size_t)c.super_groups * PANEL_G * part_size(f->supers);
    c.minimum_supers = c.minima + (size_t)c.groups * PANEL_G * part_size(f->minima);
    c.zeros = c.minimum_supers + (size_t)c.super_groups * PANEL_G * part_size(f->minimum_supers);
    c.numbers = c.zeros + (size_t)c.groups * PANEL_G * part_size(f->zeros);
    c.numbers = (c.numbers + QUAD_VECTOR - 1) / QUAD_VECTOR * QUAD_VECTOR; /* vectors stay aligned */
    c.bytes = c.numbers + (size_t)steps_of(depth) * 2 * vector_bytes(f->bits);
    return c;
}

/* Bytes of a panel. */
static size_t grouped_stride(const Format *f, long depth) {
    size_t whole = depth >= CHUNK_K ? chunk_of(f, CHUNK_K).bytes : 0;
    return (size_t)(depth / CHUNK_K) * whole + (depth % CHUNK_K ? chunk_of(f, depth % CHUNK_K).bytes : 0);
}

/* Bytes of a row of input. */
INLINE size_t grouped_row(long depth) { return (size_t)steps_of(depth) * (STEP_K + FACTS * 4); }
