/* Round an input to bytes in groups of 32, for products with whole numbers in groups. */
#pragma once
#include "grouped_layout.h"

#if !defined(__aarch64__)
/* 32 numbers → 8 quads of bytes, the sums of the first and of the last 16 bytes, and the scale: see quantise_step. */
INLINE float round_step(const float *x, int32_t *quads, int32_t *sums) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 v0 = _mm256_loadu_ps(x), v1 = _mm256_loadu_ps(x + 8), v2 = _mm256_loadu_ps(x + 16), v3 = _mm256_loadu_ps(x + 24);
    __m256 most = _mm256_max_ps(_mm256_max_ps(_mm256_andnot_ps(sign, v0), _mm256_andnot_ps(sign, v1)),
                                _mm256_max_ps(_mm256_andnot_ps(sign, v2), _mm256_andnot_ps(sign, v3)));
    __m256 odd = _mm256_add_ps(_mm256_add_ps(_mm256_sub_ps(v0, v0), _mm256_sub_ps(v1, v1)),
                               _mm256_add_ps(_mm256_sub_ps(v2, v2), _mm256_sub_ps(v3, v3)));
    __m128 most4 = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
    __m128 odd4 = _mm_add_ps(_mm256_castps256_ps128(odd), _mm256_extractf128_ps(odd, 1));
    most4 = _mm_max_ps(most4, _mm_movehl_ps(most4, most4)), odd4 = _mm_add_ps(odd4, _mm_movehl_ps(odd4, odd4));
    float largest = _mm_cvtss_f32(_mm_max_ss(most4, _mm_movehdup_ps(most4)));
    float wrong = _mm_cvtss_f32(_mm_add_ss(odd4, _mm_movehdup_ps(odd4)));
    float inverse = largest > 0 ? 127.0f / largest : 0;
    if (!(inverse <= 3.0e38f)) inverse = 0;
    const __m256 by = _mm256_set1_ps(inverse);
    __m256i first = _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(v0, by)), _mm256_cvtps_epi32(_mm256_mul_ps(v1, by)));
    __m256i last = _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(v2, by)), _mm256_cvtps_epi32(_mm256_mul_ps(v3, by)));
    __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(first, last), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256((__m256i *)quads, bytes);
    __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes), fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    __m256i eights = _mm256_hadd_epi32(fours, fours), halves = _mm256_hadd_epi32(eights, eights);
    sums[0] = _mm256_extract_epi32(halves, 0), sums[1] = _mm256_extract_epi32(halves, 4);
    return inverse > 0 ? largest / 127.0f + wrong : wrong;
}
#endif

/* `live` numbers → 8 quads of bytes, their scale, and the sums of the first and of the last 16 bytes; what is missing counts
 * as 0. A number that is not finite makes the scale NaN, as in `quantise`. */
INLINE float quantise_step(const float *x, long live, int32_t quads[STEP_QUADS], int32_t sums[2]) {
    float padded[STEP_K];
    if (live < STEP_K) {
        memcpy(padded, x, (size_t)live * 4);
        memset(padded + live, 0, (size_t)(STEP_K - live) * 4);
        x = padded;
    }
    return round_step(x, quads, sums);
}

/* A block of row r of a tile, and its facts: [FACTS][rows]: scale; sum, and scale · sum, of the block's bytes; the same of the first
 * 16; the same of the last. */
INLINE void step_of_row(const float *x, long live, int32_t quads[STEP_QUADS], char *facts, int rows, int r) {
    int32_t halves[2];
    float scale = quantise_step(x, live, quads, halves);
    int32_t sums[3] = {halves[0] + halves[1], halves[0], halves[1]};
    memcpy(facts += r * 4, &scale, 4);
    for (int i = 0; i < 3; i++) {
        float product = scale * (float)sums[i];
        memcpy(facts + (1 + 2 * i) * rows * 4, sums + i, 4);
        memcpy(facts + (2 + 2 * i) * rows * 4, &product, 4);
    }
}

/* Rows `row` … of one tile, k = from … to - 1, rounded: for each block [quad][row] 4 bytes; and their facts behind all blocks. */
static void grouped_tile(const Call *call, long row, int rows, long from, long to) {
    long depth = call->depth;
    char *tile = call->tiles + row * grouped_row(depth);
    char *all_facts = tile + (size_t)steps_of(depth) * STEP_K * rows;
    for (int r = 0; r < rows; r++)
        for (long k = from; k < to; k += STEP_K) {
            int32_t quads[STEP_QUADS];
            char *step = tile + (size_t)k * rows + r * 4, *facts = all_facts + (size_t)(k / STEP_K) * FACTS * rows * 4;
            step_of_row(call->input + (row + r) * depth + k, to - k < STEP_K ? to - k : STEP_K, quads, facts, rows, r);
            for (int q = 0; q < STEP_QUADS; q++) memcpy(step + q * rows * 4, quads + q, 4);
        }
}
