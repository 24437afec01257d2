/* Tiles of int8 for two rows and more with ARM's I8MM: one instruction multiplies eight k's of two rows with eight of two
 * columns. The layout of weights and inputs is that of all others; sums of whole numbers are the same in any order. */
#pragma once
#include "quads.h"

/* The pairs of columns of four columns' quads, and of those after them: two times [column][8 k's]. */
#define COLUMN_PAIR(half, now, next) vreinterpretq_s8_s32(half ? vzip2q_s32(now, next) : vzip1q_s32(now, next))

/* Two rows' quads, and those after them: [row][8 k's]. Of an odd row's partner, anything: nobody reads its sums. */
INLINE int8x16_t row_pair(const char *now, const char *next) {
    int32x2_t none = vdup_n_s32(0), a = vreinterpret_s32_s8(vld1_s8((const int8_t *)now));
    int32x2_t b = next ? vreinterpret_s32_s8(vld1_s8((const int8_t *)next)) : none;
    return vreinterpretq_s8_s32(vzip1q_s32(vcombine_s32(a, none), vcombine_s32(b, none)));
}

/* Two quads of all rows, or one, if it is the last of an odd number. w [quads][16 columns][4], x [quads][rows][4]. */
INLINE void pair_step(int rows, int two, const char *x, const char *w, int32x4_t sums[3][8]) {
    int8x16_t of_rows[3];
#pragma GCC unroll 3
    for (int p = 0; 2 * p < rows; p++) of_rows[p] = row_pair(x + 8 * p, two ? x + rows * QUAD_BYTES + 8 * p : NULL);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        int32x4_t now = bytes16(w + 16 * i), next = two ? bytes16(w + 64 + 16 * i) : vdupq_n_s32(0);
        int8x16_t low = COLUMN_PAIR(0, now, next), high = COLUMN_PAIR(1, now, next);
#pragma GCC unroll 3
        for (int p = 0; 2 * p < rows; p++) {
            sums[p][2 * i] = vmmlaq_s32(sums[p][2 * i], of_rows[p], low);
            sums[p][2 * i + 1] = vmmlaq_s32(sums[p][2 * i + 1], of_rows[p], high);
        }
        __asm__ volatile("" ::: "memory"); /* as in TILE: not all columns' registers at once */
    }
}

/* Add a group's sums, scaled, to the totals of four columns of a row. */
INLINE void pair_fold(int32x4_t sums, float x_scale, const char *scales, float *to) {
    float32x4_t scale = vmulq_f32(vdupq_n_f32(x_scale), vld1q_f32((const float *)scales));
    vst1q_f32(to, vfmaq_f32(vld1q_f32(to), vcvtq_f32_s32(sums), scale));
}

/* `rows` rows, a constant of 2 to 6, by one panel of 16 columns; totals [rows][16] begin at 0. */
INLINE void tile8_pairs(int rows, int ahead, const char *x, const char *w, long depth, float *totals) {
    long quads = quads_of(depth);
    const float *x_scale = (const float *)(x + (size_t)quads * QUAD_BYTES * rows);
    const char *scales = w + (size_t)quads * ROW_BYTES;
    memset(totals, 0, sizeof(float) * (size_t)rows * PANEL8);
    for (long from = 0; from < quads; from += GROUP_QUADS) {
        long to = from + GROUP_QUADS < quads ? from + GROUP_QUADS : quads, q = from;
        int32x4_t sums[3][8];
#pragma GCC unroll 3
        for (int p = 0; p < 3; p++)
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) sums[p][i] = vdupq_n_s32(0);
        for (; q + 1 < to; q += 2, w += 2 * ROW_BYTES, x += 2 * rows * QUAD_BYTES) {
            if (ahead) PREFETCH(w + 8192), PREFETCH(w + 8192 + ROW_BYTES);
            pair_step(rows, 1, x, w, sums);
        }
        if (q < to) {
            pair_step(rows, 0, x, w, sums);
            w += ROW_BYTES, x += rows * QUAD_BYTES;
        }
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                int64x2_t a = vreinterpretq_s64_s32(sums[r / 2][2 * i]), b = vreinterpretq_s64_s32(sums[r / 2][2 * i + 1]);
                int64x2_t of_row = r & 1 ? vtrn2q_s64(a, b) : vtrn1q_s64(a, b);
                pair_fold(vreinterpretq_s32_s64(of_row), x_scale[r], scales + 16 * i, totals + r * PANEL8 + 4 * i);
            }
        x_scale += rows, scales += PANEL8 * 4;
    }
}

#define TILE8_PAIRS(ROWS)                                                                                                \
    INLINE void tile8_##ROWS##2(int ahead, const char *x, const char *w, size_t stride, long depth,                      \
                                float totals[ROWS][PANEL8]) {                                                            \
        (void)stride;                                                                                                    \
        tile8_pairs(ROWS, ahead, x, w, depth, totals[0]);                                                                \
    }
