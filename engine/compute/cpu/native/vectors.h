/* Vectors of float32: one name for an operation whatever the processor. Each operation rounds every lane as IEEE 754 says,
 * so the width of a vector cannot be seen in a result. */
#pragma once
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

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
#define NEGATIVE(a, yes, no) _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, ZERO(), _CMP_LT_OQ), no, yes)
#define MINUS_ABS(a) _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(a), _mm512_set1_epi32((int)0x80000000)))
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
#define NEGATIVE(a, yes, no) _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, ZERO(), _CMP_LT_OQ))
#define MINUS_ABS(a) _mm256_or_ps(a, SET(-0.0f))
#define LOADI(p) _mm256_loadu_si256((const __m256i *)(p))
#define LOW_HALF(p) _mm256_castsi256_ps(_mm256_slli_epi32(LOADI(p), 16))
#define HIGH_HALF(p) _mm256_castsi256_ps(_mm256_and_si256(LOADI(p), _mm256_set1_epi32((int)0xffff0000)))
#endif
