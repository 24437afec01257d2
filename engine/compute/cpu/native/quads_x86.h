/* The names of quads.h with VNNI, or with AVX2 alone.
 *
 * VNNI multiplies and adds a quad in one instruction. Its left factor is unsigned, so 128 is added to the input's bytes and
 * 128 times the weights' sum taken off at the start: an int32 for each group and column, stored with the weights (STARTS).
 * Without VNNI bytes are widened to 16 bits and multiplied in pairs, so nothing saturates. */
#pragma once
#include "vectors.h"

#if defined(__AVX512VNNI__) && defined(__AVX512F__)
#define VNNI 1
#define COLUMNS 16 /* of the result in a vector of int32 */
typedef __m512i vi;
#define SUM_START(p) _mm512_loadu_si512(p)
#define QUADS(p) _mm512_loadu_si512(p)
#define INPUT(p) _mm512_set1_epi32(*(const int32_t *)(p))
#define DOT(x, w, s) _mm512_dpbusd_epi32(s, x, w)
#define QUAD_BYTES 4
#elif defined(__AVXVNNI__) || defined(VERBATIM_EMULATE_VNNI)
#define VNNI 1
#define COLUMNS 8
typedef __m256i vi;
#define SUM_START(p) _mm256_loadu_si256((const __m256i *)(p))
#define QUADS(p) _mm256_loadu_si256((const __m256i *)(p))
#define INPUT(p) _mm256_set1_epi32(*(const int32_t *)(p))
#define QUAD_BYTES 4
#if defined(__AVXVNNI__)
#define DOT(x, w, s) _mm256_dpbusd_avx_epi32(s, x, w)
#else /* for a test on a machine without it */
INLINE __m256i emulated_dot(__m256i x, __m256i w, __m256i s) {
    uint8_t a[32];
    int8_t b[32];
    int32_t c[8];
    memcpy(a, &x, 32), memcpy(b, &w, 32), memcpy(c, &s, 32);
    for (int i = 0; i < 32; i++) c[i / 4] += (int32_t)a[i] * b[i];
    memcpy(&s, c, 32);
    return s;
}
#define DOT(x, w, s) emulated_dot(x, w, s)
#endif
#else
#define VNNI 0
#define COLUMNS 4 /* two halves of a quad's sum for each, added in FOLD */
typedef __m256i vi;
#define SUM_START(p) _mm256_setzero_si256()
#define QUADS(p) _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(p)))
#define INPUT(p) _mm256_set1_epi64x(*(const int64_t *)(p))
#define DOT(x, w, s) _mm256_add_epi32(s, _mm256_madd_epi16(x, w))
#define QUAD_BYTES 8 /* of the input: bytes widened to 16 bits */
#endif
#define I8MM 0
#define STARTS VNNI
#define WHOLE_COLUMNS VNNI

/* Four numbers of -127 … 127 → one quad of an input. */
INLINE void put_quad(char *to, const int32_t *from) {
    __m128i quad = _mm_loadu_si128((const __m128i *)from);
#if VNNI
    quad = _mm_add_epi32(quad, _mm_set1_epi32(128));
    _mm_storeu_si32(to, _mm_packus_epi16(_mm_packus_epi32(quad, quad), quad));
#else
    _mm_storel_epi64((__m128i *)to, _mm_packs_epi32(quad, quad));
#endif
}
