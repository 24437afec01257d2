/* The names of vectors.h with AVX2 and FMA, or AVX-512. */
#pragma once
#include <immintrin.h>

#define PREFETCH(p) _mm_prefetch((const char *)(p), _MM_HINT_T0)

#if defined(__AVX512F__)
#define LANES 16
typedef __m512 vf;
#define ZERO() _mm512_setzero_ps()
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, v) _mm512_storeu_ps(p, v)
#define SET(x) _mm512_set1_ps(x)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define ADD(a, b) _mm512_add_ps(a, b)
#define SUB(a, b) _mm512_sub_ps(a, b)
#define MUL(a, b) _mm512_mul_ps(a, b)
#define DIV(a, b) _mm512_div_ps(a, b)
#define MAX(a, b) _mm512_max_ps(a, b)
#define ABS(a) _mm512_abs_ps(a)
#define NEGATIVE(a, yes, no) _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, ZERO(), _CMP_LT_OQ), no, yes)
#define MINUS_ABS(a) _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(a), _mm512_set1_epi32((int)0x80000000)))
#define ROUND(a) _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define POWER_OF_TWO(n)                                                                                                  \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23))
#define UNLESS_BELOW(x, least, v) _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, SET(least), _CMP_NLT_UQ), v)
#define STORE_WHOLE(p, v) _mm512_storeu_si512(p, _mm512_cvtps_epi32(v))
#define LOW_HALF(p) _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))
#define HIGH_HALF(p) _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32((int)0xffff0000)))
#else
#define LANES 8
typedef __m256 vf;
#define ZERO() _mm256_setzero_ps()
#define LOAD(p) _mm256_loadu_ps(p)
#define STORE(p, v) _mm256_storeu_ps(p, v)
#define SET(x) _mm256_set1_ps(x)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define ADD(a, b) _mm256_add_ps(a, b)
#define SUB(a, b) _mm256_sub_ps(a, b)
#define MUL(a, b) _mm256_mul_ps(a, b)
#define DIV(a, b) _mm256_div_ps(a, b)
#define MAX(a, b) _mm256_max_ps(a, b)
#define ABS(a) _mm256_andnot_ps(SET(-0.0f), a)
#define NEGATIVE(a, yes, no) _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, ZERO(), _CMP_LT_OQ))
#define MINUS_ABS(a) _mm256_or_ps(a, SET(-0.0f))
#define ROUND(a) _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define POWER_OF_TWO(n)                                                                                                  \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23))
#define UNLESS_BELOW(x, least, v) _mm256_and_ps(_mm256_cmp_ps(x, SET(least), _CMP_NLT_UQ), v)
#define STORE_WHOLE(p, v) _mm256_storeu_si256((__m256i *)(p), _mm256_cvtps_epi32(v))
#define LOADI(p) _mm256_loadu_si256((const __m256i *)(p))
#define LOW_HALF(p) _mm256_castsi256_ps(_mm256_slli_epi32(LOADI(p), 16))
#define HIGH_HALF(p) _mm256_castsi256_ps(_mm256_and_si256(LOADI(p), _mm256_set1_epi32((int)0xffff0000)))
#endif

/* Sixteen numbers summed as a tree: i and i + 8, then i and i + 4, … */
INLINE float tree(const float *p) {
    __m256 v = _mm256_add_ps(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8));
    __m128 u = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    u = _mm_add_ps(u, _mm_movehl_ps(u, u));
    return _mm_cvtss_f32(_mm_add_ss(u, _mm_shuffle_ps(u, u, 1)));
}

/* The largest of sixteen numbers and `least`. */
INLINE float largest_of(const float *p, float least) {
    __m256 v = _mm256_max_ps(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8));
    __m128 u = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    u = _mm_max_ps(u, _mm_movehl_ps(u, u));
    float found = _mm_cvtss_f32(_mm_max_ss(u, _mm_shuffle_ps(u, u, 1)));
    return found > least ? found : least;
}
