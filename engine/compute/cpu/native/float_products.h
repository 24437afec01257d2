/* Products with weights in float32, or in bfloat16 where that loses nothing. */
#pragma once
#include "tiles.h"

#define AT(c) (w + ((c) >> 1) * stride + ((c) & 1) * sizeof(vf)) /* two vectors a panel */

#define DECLARE_1(r, c) vf a##r##c = ZERO();
#define DECLARE(r, V) V(DECLARE_1, r)
/* a = fma(x[r], w, a) for a row's vectors. */
#define STEP(r, V) STEP_##V(r)
#define STEP_1(r, c) a##r##c = FMA(s, w##c, a##r##c);
#if defined(__x86_64__)
/* As the instructions themselves: left to itself a compiler runs out of registers here, and moves sums to memory and back
 * in the innermost loop (a third of the speed). */
#define FUSE(c) "vfmadd231ps %[w" #c "], %[s], %[a" #c "]\n\t"
#define SUM(r, c) [a##c] "+v"(a##r##c)
#define WEIGHT(c) [w##c] "v"(w##c)
#define STEP_V1(r) { vf s; __asm__ volatile("vbroadcastss %[x], %[s]\n\t" FUSE(0)                                         \
    : SUM(r, 0), [s] "=&v"(s) : [x] "m"(x[r]), WEIGHT(0)); }
#define STEP_V2(r) { vf s; __asm__ volatile("vbroadcastss %[x], %[s]\n\t" FUSE(0) FUSE(1)                                 \
    : SUM(r, 0), SUM(r, 1), [s] "=&v"(s) : [x] "m"(x[r]), WEIGHT(0), WEIGHT(1)); }
#define STEP_V4(r) { vf s; __asm__ volatile("vbroadcastss %[x], %[s]\n\t" FUSE(0) FUSE(1) FUSE(2) FUSE(3)                 \
    : SUM(r, 0), SUM(r, 1), SUM(r, 2), SUM(r, 3), [s] "=&v"(s)                                                           \
    : [x] "m"(x[r]), WEIGHT(0), WEIGHT(1), WEIGHT(2), WEIGHT(3)); }
#else
#define STEP_V1(r) { vf s = SET(x[r]); V1(STEP_1, r) }
#define STEP_V2(r) { vf s = SET(x[r]); V2(STEP_1, r) }
#define STEP_V4(r) { vf s = SET(x[r]); V4(STEP_1, r) }
#endif
#define STEP_V8(r) { vf s = SET(x[r]); V8(STEP_1, r) }
#define KEEP_1(r, c) sums[r][c] = a##r##c;
#define KEEP(r, V) V(KEEP_1, r)
#define WORD_LOW(r, c) vf w##c = LOW_HALF(AT(c));
#define WORD_HIGH(r, c) vf w##c = HIGH_HALF(AT(c));
/* The first rows bring a panel from memory: it is fetched two pages ahead. One or two rows are faster without. */
#define AHEAD(r, c) if (((c) & 1) == 0) PREFETCH(AT(c) + 8192);
#define WORD_WHOLE(r, c) vf w##c = LOAD((const float *)AT(c));

/* tile_RV: R rows by V vectors over `count` k's. The empty asm keeps the compiler from holding both halves of a pair in
 * registers that it does not have. */
#define TILE(ROWS, R, VECTORS, V)                                                                                        \
    INLINE void tile_##ROWS##VECTORS(int kind, int ahead, const float *x, const char *w, size_t stride, long count,      \
                                     vf sums[ROWS][VECTORS]) {                                                           \
        R(DECLARE, V)                                                                                                    \
        if (kind == BFLOAT16) {                                                                                          \
            for (long k = 0; k + 1 < count; k += 2, w += PANEL * 4) {                                                    \
                if (ROWS > 2 && ahead) { V(AHEAD, 0) }                                                                   \
                { V(WORD_LOW, 0) R(STEP, V) }                                                                            \
                x += ROWS;                                                                                               \
                __asm__ volatile("" ::: "memory");                                                                       \
                { V(WORD_HIGH, 0) R(STEP, V) }                                                                           \
                x += ROWS;                                                                                               \
            }                                                                                                            \
            if (count & 1) { V(WORD_LOW, 0) R(STEP, V) }                                                                 \
        } else                                                                                                           \
            for (long k = 0; k < count; k++, w += PANEL * 4, x += ROWS) {                                                \
                if (ROWS > 2 && ahead) { V(AHEAD, 0) }                                                                   \
                V(WORD_WHOLE, 0) R(STEP, V)                                                                              \
            }                                                                                                            \
        R(KEEP, V)                                                                                                       \
    }

TILE(1, R1, 8, V8) TILE(1, R1, 4, V4) TILE(1, R1, 2, V2)
TILE(2, R2, 4, V4) TILE(2, R2, 2, V2)
TILE(3, R3, 4, V4) TILE(3, R3, 2, V2)
TILE(4, R4, 2, V2) TILE(5, R5, 2, V2) TILE(6, R6, 2, V2)

/* Sums of `rows` by `vectors` → out, whose first column is `column`: set or, after the first block, added to. */
INLINE void finish(int rows, int vectors, const vf *sums, const Matrix *m, float *out, long column, int first, int last) {
    for (int c = 0; c < vectors; c++) {
        long n = column + (long)c * LANES, live = m->columns - n;
        for (int r = 0; r < rows && live > 0; r++) {
            float *to = out + r * m->columns + n;
            vf v = sums[r * vectors + c];
            if (live >= LANES) {
                if (!first) v = ADD(LOAD(to), v);
                if (last && m->bias) v = ADD(v, LOAD(m->bias + n));
                STORE(to, v);
            } else {
                float part[LANES];
                STORE(part, v);
                for (long i = 0; i < live; i++) {
                    float s = first ? part[i] : to[i] + part[i];
                    to[i] = last && m->bias ? s + m->bias[n + i] : s;
                }
            }
        }
    }
}

#define FLOAT_CASE(ROWS, VECTORS)                                                                                        \
    {                                                                                                                    \
        vf sums[ROWS][VECTORS];                                                                                          \
        tile_##ROWS##VECTORS(kind, ahead, x + from * ROWS,                                                               \
                             w + (size_t)(kind == BFLOAT16 ? from / 2 : from) * PANEL * 4, stride, to - from, sums);     \
        finish(ROWS, VECTORS, sums[0], m, out, column, from == 0, last);                                                 \
    }

/* One tile: `rows` rows, `panels` panels (4, 2 or 1), k = from … to - 1. */
INLINE void float_tile(int kind, int ahead, int rows, int panels, const float *x, const char *w, size_t stride, long from,
                       long to, int last, const Matrix *m, float *out, long column) {
    if (panels == 4) FLOAT_CASE(1, 8)
    else if (panels == 2) {
        if (rows == 1) FLOAT_CASE(1, 4) else if (rows == 2) FLOAT_CASE(2, 4) else FLOAT_CASE(3, 4)
    } else switch (rows) {
        case 1: FLOAT_CASE(1, 2) break;
        case 2: FLOAT_CASE(2, 2) break;
        case 3: FLOAT_CASE(3, 2) break;
        case 4: FLOAT_CASE(4, 2) break;
        case 5: FLOAT_CASE(5, 2) break;
        default: FLOAT_CASE(6, 2)
    }
}

INLINE size_t float_stride(int kind, long depth) { return (size_t)(kind == BFLOAT16 ? (depth + 1) / 2 : depth) * PANEL * 4; }

/* How many panels stay in the cache while all rows are multiplied with them. With few rows, few: the next are needed soon. */
INLINE long panels_at_once(long rows, size_t bytes) {
    return rows <= 2 * TALLEST || bytes >= CACHED / 4 ? 4 : (long)(CACHED / bytes);
}

/* Panels begin … end - 1 of one matrix. Weights are read from memory once, and from the cache for every tile of rows. */
INLINE void float_panels(int kind, const Call *call, const Matrix *m, float *out, long begin, long end) {
    size_t stride = float_stride(kind, call->depth);
    size_t of_block = float_stride(kind, call->depth < BLOCK ? call->depth : BLOCK);
    long group = panels_at_once(call->rows, of_block);
    for (long g = begin; g < end; g += group) {
        long stop = g + group < end ? g + group : end;
        for (long from = 0; from < call->depth; from += BLOCK) {
            long to = from + BLOCK < call->depth ? from + BLOCK : call->depth;
            for (long row = 0; row < call->rows;) {
                int rows = height(TALLEST, call->rows - row);
                const float *x = (const float *)call->tiles + row * call->depth;
                for (long p = g; p < stop;) {
                    int panels = rows == 1 && stop - p >= 4 ? 4 : rows <= 3 && stop - p >= 2 ? 2 : 1;
                    float_tile(kind, row == 0, rows, panels, x, m->weight + p * stride, stride, from, to, to == call->depth,
                               m, out + row * m->columns, p * PANEL);
                    p += panels;
                }
                row += rows;
            }
        }
    }
}

/* Rows `row` … of one tile, k = from … to - 1, side by side: so that what a tile needs at one k lies together. */
static void interleave(const Call *call, long row, int rows, long from, long to) {
    const float *x = call->input + row * call->depth;
    float *tile = (float *)call->tiles + row * call->depth;
    for (long k = from; k < to; k++)
        for (int r = 0; r < rows; r++) tile[k * rows + r] = x[r * call->depth + k];
}
