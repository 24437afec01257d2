/* Products with weights and inputs in int8, in groups of 128 with a scale each. */
#pragma once
#include "quads.h"
#include "tiles.h"

/* ---- int8 -------------------------------------------------------------------------------------------------------------
 * Four k's of a column stand together (a quad). Sums of products are whole numbers: exact, and the same with every
 * processor's instructions (quads.h). */

enum {
    PANEL8 = 2 * COLUMNS,          /* columns of a panel */
    ROW_BYTES = PANEL8 * 4,        /* of a panel: one quad of each column */
    GROUP_QUADS = GROUP / 4
};

INLINE long quads_of(long depth) { return (depth + 3) / 4; }
INLINE long groups_of(long depth) { return (depth + GROUP - 1) / GROUP; }
/* A panel: its quads; a float scale for each group and column; with STARTS an int32 to begin with, likewise. */
INLINE size_t int8_stride(long depth) {
    return (size_t)quads_of(depth) * ROW_BYTES + (size_t)groups_of(depth) * PANEL8 * (STARTS ? 8 : 4);
}
/* A row of quantised input: its quads, then its scales. */
INLINE size_t int8_row(long depth) { return (size_t)quads_of(depth) * QUAD_BYTES + (size_t)groups_of(depth) * 8; }

#define AT8(c) (w + ((c) >> 1) * stride + ((c) & 1) * (ROW_BYTES / 2))
#define START8(c) (starts + ((c) >> 1) * stride + ((c) & 1) * (COLUMNS * 4))
#define DECLARE8_1(r, c) vi a##r##c = SUM_START(START8(c));
#define DECLARE8(r, V) V(DECLARE8_1, r)
/* The first rows bring a panel from memory, and what the processor fetches ahead by itself ends with the page. Two pages
 * ahead was the best distance (a quarter faster than none, for one row as for eight). */
#define AHEAD8(r, c) if (((c) & 1) == 0) PREFETCH(AT8(c) + 8192);
#define WORD8(r, c) vi w##c = QUADS(AT8(c));
#define STEP8_1(r, c) a##r##c = DOT(s, w##c, a##r##c);
#define STEP8(r, V) STEP8_##V(r)
#define STEP8_V4(r) { vi s = INPUT(x + (r) * QUAD_BYTES); V4(STEP8_1, r) }
#if WHOLE_COLUMNS
#define STEP8_V2(r) { vi s = INPUT(x + (r) * QUAD_BYTES); V2(STEP8_1, r) }
#else /* the same as above, with registers chosen by hand as in STEP_V2 */
#define STEP8_V2(r) { vi s, t; __asm__ volatile(                                                                         \
    "vpbroadcastq %[x], %[s]\n\tvpmaddwd %[w0], %[s], %[t]\n\tvpaddd %[t], %[a0], %[a0]\n\t"                             \
    "vpmaddwd %[w1], %[s], %[s]\n\tvpaddd %[s], %[a1], %[a1]"                                                            \
    : [a0] "+x"(a##r##0), [a1] "+x"(a##r##1), [s] "=&x"(s), [t] "=&x"(t)                                                 \
    : [x] "m"(*(const int64_t *)(x + (r) * QUAD_BYTES)), [w0] "x"(w0), [w1] "x"(w1)); }
#endif
#define FOLD8(r, V) V##_FOLD(r)
#define V2_FOLD(r) FOLD(r, 0, a##r##0, a##r##1)
#define V4_FOLD(r) V2_FOLD(r) FOLD(r, 1, a##r##2, a##r##3)
#if WHOLE_COLUMNS
/* Two vectors of columns from one panel. */
#define PART(r, i, sum, offset)                                                                                          \
    {                                                                                                                    \
        float whole[COLUMNS];                                                                                            \
        int32_t sums32[COLUMNS];                                                                                         \
        memcpy(sums32, &sum, sizeof sum);                                                                                \
        const float *scale = (const float *)(scales + (i) * stride) + (offset);                                          \
        float *to = totals[r] + (i) * PANEL8 + (offset);                                                                 \
        for (int n = 0; n < COLUMNS; n++) whole[n] = (float)sums32[n];                                                   \
        for (int n = 0; n < COLUMNS; n++) to[n] = __builtin_fmaf(whole[n], x_scale[r] * scale[n], to[n]);                \
    }
#define FOLD(r, i, low, high) PART(r, i, low, 0) PART(r, i, high, COLUMNS)
#else
#define FOLD(r, i, low, high)                                                                                            \
    {                                                                                                                    \
        __m256 whole = _mm256_cvtepi32_ps(_mm256_permute4x64_epi64(_mm256_hadd_epi32(low, high), 0xD8));                 \
        __m256 scale = _mm256_mul_ps(_mm256_set1_ps(x_scale[r]), _mm256_loadu_ps((const float *)(scales + (i) * stride)));\
        float *to = totals[r] + (i) * PANEL8;                                                                            \
        _mm256_storeu_ps(to, _mm256_fmadd_ps(whole, scale, _mm256_loadu_ps(to)));                                        \
    }
#endif

/* R rows by V vectors over the whole depth; `totals` [R][V / 2 * PANEL8] begin at 0. */
#define TILE8(ROWS, R, VECTORS, V)                                                                                       \
    INLINE void tile8_##ROWS##VECTORS(int ahead, const char *x, const char *w, size_t stride, long depth,                \
                                      float totals[ROWS][VECTORS / 2 * PANEL8]) {                                        \
        long quads = quads_of(depth);                                                                                    \
        const float *x_scale = (const float *)(x + (size_t)quads * QUAD_BYTES * ROWS);                                   \
        const char *scales = w + (size_t)quads * ROW_BYTES;                                                              \
        const char *starts = scales + (size_t)groups_of(depth) * PANEL8 * 4;                                             \
        memset(totals, 0, sizeof(float) * ROWS * (VECTORS / 2 * PANEL8));                                                \
        for (long from = 0; from < quads; from += GROUP_QUADS) {                                                         \
            long to = from + GROUP_QUADS < quads ? from + GROUP_QUADS : quads;                                           \
            R(DECLARE8, V)                                                                                               \
            for (long q = from; q < to; q++, w += ROW_BYTES, x += ROWS * QUAD_BYTES) {                                   \
                if (ahead && (q & 1) == 0) { V(AHEAD8, 0) }                                                              \
                V(WORD8, 0) R(STEP8, V)                                                                                  \
            }                                                                                                            \
            R(FOLD8, V)                                                                                                  \
            x_scale += ROWS, scales += PANEL8 * 4, starts += PANEL8 * 4;                                                 \
        }                                                                                                                \
        (void)starts;                                                                                                    \
    }

TILE8(1, R1, 4, V4) TILE8(1, R1, 2, V2) TILE8(2, R2, 4, V4)
#if I8MM
#include "int8_pairs.h"
TILE8_PAIRS(2) TILE8_PAIRS(3) TILE8_PAIRS(4) TILE8_PAIRS(5) TILE8_PAIRS(6)
#else
TILE8(2, R2, 2, V2) TILE8(3, R3, 2, V2) TILE8(4, R4, 2, V2) TILE8(5, R5, 2, V2) TILE8(6, R6, 2, V2)
#endif

INLINE void finish8(int rows, int width, const float *totals, const Matrix *m, float *out, long column) {
    long live = m->columns - column < width ? m->columns - column : width;
    for (int r = 0; r < rows; r++)
        for (long i = 0; i < live; i++)
            out[r * m->columns + column + i] = m->bias ? totals[r * width + i] + m->bias[column + i] : totals[r * width + i];
}

#define INT8_CASE(ROWS, VECTORS)                                                                                         \
    {                                                                                                                    \
        float totals[ROWS][VECTORS / 2 * PANEL8];                                                                        \
        tile8_##ROWS##VECTORS(row == 0, x, w, stride, depth, totals);                                                    \
        finish8(ROWS, VECTORS / 2 * PANEL8, totals[0], m, out, column);                                                  \
    }

static void int8_panels(const Call *call, const Matrix *m, float *all, long begin, long end) {
    long depth = call->depth;
    size_t stride = int8_stride(depth);
    long group = panels_at_once(call->rows, stride);
    for (long g = begin; g < end; g += group) {
        long stop = g + group < end ? g + group : end;
        for (long row = 0; row < call->rows;) {
            int rows = height(TALLEST, call->rows - row);
            const char *x = call->tiles + row * int8_row(depth);
            float *out = all + row * m->columns;
            for (long p = g; p < stop;) {
                int panels = rows <= (I8MM ? 1 : 2) && stop - p >= 2 ? 2 : 1;
                const char *w = m->weight + p * stride;
                long column = p * PANEL8;
                if (panels == 2) {
                    if (rows == 1) INT8_CASE(1, 4) else INT8_CASE(2, 4)
                } else switch (rows) {
                    case 1: INT8_CASE(1, 2) break;
                    case 2: INT8_CASE(2, 2) break;
                    case 3: INT8_CASE(3, 2) break;
                    case 4: INT8_CASE(4, 2) break;
                    case 5: INT8_CASE(5, 2) break;
                    default: INT8_CASE(6, 2)
                }
                p += panels;
            }
            row += rows;
        }
    }
}

/* `live` numbers → bytes of GROUP numbers and their scale; what is missing counts as 0. A number that is not finite makes
 * the scale NaN, and so the row's result: it must not become a number like any other. */
static float quantise(const float *x, long live, int32_t *bytes) {
    float padded[GROUP];
    memcpy(padded, x, (size_t)live * 4);
    memset(padded + live, 0, (size_t)(GROUP - live) * 4);
    vf most = ZERO(), odd = ZERO();
    for (int i = 0; i < GROUP; i += LANES) {
        vf v = LOAD(padded + i);
        most = MAX(most, ABS(v));
        odd = ADD(odd, SUB(v, v));
    }
    float lanes[LANES], strange[LANES], largest = 0, wrong = 0;
    STORE(lanes, most), STORE(strange, odd);
    for (int i = 0; i < LANES; i++) {
        largest = lanes[i] > largest ? lanes[i] : largest;
        wrong += strange[i];
    }
    float inverse = largest > 0 ? 127.0f / largest : 0;
    /* The smallest numbers have no inverse: they are 0, as they are beside anything else. */
    if (!(inverse <= 3.0e38f)) inverse = 0;
    for (int i = 0; i < GROUP; i += LANES) STORE_WHOLE(bytes + i, MUL(LOAD(padded + i), SET(inverse)));
    return inverse > 0 ? largest / 127.0f + wrong : wrong;
}

/* The same as `interleave`, rounded; `from` is where a group begins. */
static void quantise_tile(const Call *call, long row, int rows, long from, long to) {
    long depth = call->depth, quads = quads_of(depth);
    char *tile = call->tiles + row * int8_row(depth);
    float *scales = (float *)(tile + (size_t)quads * QUAD_BYTES * rows);
    for (int r = 0; r < rows; r++)
        for (long g = from / GROUP; g * GROUP < to; g++) {
            int32_t bytes[GROUP];
            long live = depth - g * GROUP < GROUP ? depth - g * GROUP : GROUP;
            scales[g * rows + r] = quantise(call->input + (row + r) * depth + g * GROUP, live, bytes);
            for (long q = 0; q < (live + 3) / 4; q++)
                put_quad(tile + ((g * GROUP_QUADS + q) * rows + r) * QUAD_BYTES, bytes + 4 * q);
        }
}
