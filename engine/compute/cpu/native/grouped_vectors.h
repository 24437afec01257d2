/* Vectors for products with whole numbers in groups: one name for an operation whatever the processor. A vector holds one
 * quad (four neighbouring k's, a byte each) of WIDTH columns, or an int32 or float32 of each. Knows no layout. */
#pragma once
#include "int8_products.h"

#if defined(__aarch64__)
#include "grouped_vectors_neon.h"

#elif defined(VERBATIM_EMULATE_WIDE) && !defined(__AVX512F__) /* AVX-512's layout for a test on a machine without it: two vectors side by side */
#define WIDTH 16
typedef struct { __m256i a, b; } wi;
typedef struct { __m256 a, b; } wf;
#define BOTH(type, f, x) ((type){f((x).a), f((x).b)})
#define BOTH2(type, f, x, y) ((type){f((x).a, (y).a), f((x).b, (y).b)})
#define AT2(f, p, bytes) {f(p), f((const char *)(p) + (bytes))}
INLINE wi I_LOAD(const void *p) { return (wi)AT2(LOADI, p, 32); }
INLINE wi I_QUAD(const void *p) { __m256i v = _mm256_set1_epi32(*(const int32_t *)p); return (wi){v, v}; }
INLINE wi I_SET8(char x) { return (wi){_mm256_set1_epi8(x), _mm256_set1_epi8(x)}; }
INLINE wi I_SET16(short x) { return (wi){_mm256_set1_epi16(x), _mm256_set1_epi16(x)}; }
INLINE wi I_ZERO(void) { return I_SET8(0); }
INLINE wi I_AND(wi x, wi y) { return BOTH2(wi, _mm256_and_si256, x, y); }
INLINE wi I_OR(wi x, wi y) { return BOTH2(wi, _mm256_or_si256, x, y); }
INLINE wi I_ADD16(wi x, wi y) { return BOTH2(wi, _mm256_add_epi16, x, y); }
INLINE wi I_ADD32(wi x, wi y) { return BOTH2(wi, _mm256_add_epi32, x, y); }
INLINE wi I_SUB32(wi x, wi y) { return BOTH2(wi, _mm256_sub_epi32, x, y); }
INLINE wi I_MADD8(wi x, wi y) { return BOTH2(wi, _mm256_maddubs_epi16, x, y); }
INLINE wi I_MADD16(wi x, wi y) { return BOTH2(wi, _mm256_madd_epi16, x, y); }
INLINE wi I_TIMES(wi x, wi y) { return BOTH2(wi, _mm256_mullo_epi32, x, y); }
INLINE wi I_ABS(wi x) { return BOTH(wi, _mm256_abs_epi8, x); }
INLINE wi I_SIGNED(wi x, wi y) { return BOTH2(wi, _mm256_sign_epi8, x, y); }
INLINE wi I_TOP(wi x) { return (wi){_mm256_xor_si256(x.a, _mm256_set1_epi8(-128)), _mm256_xor_si256(x.b, _mm256_set1_epi8(-128))}; }
INLINE wi I_LEFT(wi x, int n) { return (wi){_mm256_slli_epi16(x.a, n), _mm256_slli_epi16(x.b, n)}; }
INLINE wi I_RIGHT(wi x, int n) { return (wi){_mm256_srli_epi16(x.a, n), _mm256_srli_epi16(x.b, n)}; }
#define U8_AT(p) _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p)))
#define S8_AT(p) _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p)))
#define F16_AT(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define U16_AT(p) _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))), 16)
INLINE wi I_FROM_U8(const void *p) { return (wi)AT2(U8_AT, p, 8); }
INLINE wi I_FROM_S8(const void *p) { return (wi)AT2(S8_AT, p, 8); }
INLINE void I_STORE(void *p, wi x) { memcpy(p, &x, sizeof x); }
INLINE wf F_LOAD(const void *p) { wf x; memcpy(&x, p, sizeof x); return x; }
INLINE void F_STORE(float *p, wf x) { memcpy(p, &x, sizeof x); }
INLINE wf F_SET(float x) { return (wf){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE wf F_MUL(wf x, wf y) { return BOTH2(wf, _mm256_mul_ps, x, y); }
INLINE wf F_FMA(wf x, wf y, wf z) { return (wf){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
INLINE wf F_LESS(wf x, wf y, wf z) { return (wf){_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)}; }
INLINE wf F_FROM_INT(wi x) { return BOTH(wf, _mm256_cvtepi32_ps, x); }
INLINE wf F_FROM_F16(const void *p) { return (wf)AT2(F16_AT, p, 16); }
INLINE wf F_FROM_BF16(const void *p) {
    return (wf){_mm256_castsi256_ps(U16_AT(p)), _mm256_castsi256_ps(U16_AT((const char *)p + 16))};
}
#if defined(VERBATIM_EMULATE_VNNI)
#define QUAD_SUMS 1
INLINE wi I_DOT(wi q, wi x, wi s) { return (wi){emulated_dot(q.a, x.a, s.a), emulated_dot(q.b, x.b, s.b)}; }
#else
#define QUAD_SUMS 0
#endif

#elif defined(__AVX512BW__)
#define WIDTH 16
typedef __m512i wi;
typedef __m512 wf;
#define I_LOAD(p) _mm512_loadu_si512(p)
#define I_STORE(p, v) _mm512_storeu_si512(p, v)
#define I_QUAD(p) _mm512_set1_epi32(*(const int32_t *)(p))
#define I_SET8(x) _mm512_set1_epi8(x)
#define I_SET16(x) _mm512_set1_epi16(x)
#define I_ZERO() _mm512_setzero_si512()
#define I_AND(x, y) _mm512_and_si512(x, y)
#define I_OR(x, y) _mm512_or_si512(x, y)
#define I_ADD16(x, y) _mm512_add_epi16(x, y)
#define I_ADD32(x, y) _mm512_add_epi32(x, y)
#define I_SUB32(x, y) _mm512_sub_epi32(x, y)
#define I_MADD8(q, x) _mm512_maddubs_epi16(q, x)
#define I_MADD16(x, y) _mm512_madd_epi16(x, y)
#define I_TIMES(x, y) _mm512_mullo_epi32(x, y)
#define I_ABS(x) _mm512_abs_epi8(x)
#define I_SIGNED(x, y) _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(y), _mm512_setzero_si512(), x) /* where y is 0 it is of no account */
#define I_TOP(x) _mm512_xor_si512(x, _mm512_set1_epi8(-128))
#define I_LEFT(x, n) _mm512_slli_epi16(x, n)
#define I_RIGHT(x, n) _mm512_srli_epi16(x, n)
#define I_FROM_U8(p) _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define I_FROM_S8(p) _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define F_LOAD(p) _mm512_loadu_ps(p)
#define F_STORE(p, v) _mm512_storeu_ps(p, v)
#define F_SET(x) _mm512_set1_ps(x)
#define F_MUL(x, y) _mm512_mul_ps(x, y)
#define F_FMA(x, y, z) _mm512_fmadd_ps(x, y, z)
#define F_LESS(x, y, z) _mm512_fnmadd_ps(x, y, z)
#define F_FROM_INT(x) _mm512_cvtepi32_ps(x)
#define F_FROM_F16(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define F_FROM_BF16(p)                                                                                                   \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))), 16))
#if defined(__AVX512VNNI__)
#define QUAD_SUMS 1
#define I_DOT(q, x, s) _mm512_dpbusd_epi32(s, q, x)
#else
#define QUAD_SUMS 0
#endif

#else
#define WIDTH 8
typedef __m256i wi;
typedef __m256 wf;
#define I_LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define I_STORE(p, v) _mm256_storeu_si256((__m256i *)(p), v)
#define I_QUAD(p) _mm256_set1_epi32(*(const int32_t *)(p))
#define I_SET8(x) _mm256_set1_epi8(x)
#define I_SET16(x) _mm256_set1_epi16(x)
#define I_ZERO() _mm256_setzero_si256()
#define I_AND(x, y) _mm256_and_si256(x, y)
#define I_OR(x, y) _mm256_or_si256(x, y)
#define I_ADD16(x, y) _mm256_add_epi16(x, y)
#define I_ADD32(x, y) _mm256_add_epi32(x, y)
#define I_SUB32(x, y) _mm256_sub_epi32(x, y)
#define I_MADD8(q, x) _mm256_maddubs_epi16(q, x)
#define I_MADD16(x, y) _mm256_madd_epi16(x, y)
#define I_TIMES(x, y) _mm256_mullo_epi32(x, y)
#define I_ABS(x) _mm256_abs_epi8(x)
#define I_SIGNED(x, y) _mm256_sign_epi8(x, y)
#define I_TOP(x) _mm256_xor_si256(x, _mm256_set1_epi8(-128))
#define I_LEFT(x, n) _mm256_slli_epi16(x, n)
#define I_RIGHT(x, n) _mm256_srli_epi16(x, n)
#define I_FROM_U8(p) _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p)))
#define I_FROM_S8(p) _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p)))
#define F_LOAD(p) _mm256_loadu_ps(p)
#define F_STORE(p, v) _mm256_storeu_ps(p, v)
#define F_SET(x) _mm256_set1_ps(x)
#define F_MUL(x, y) _mm256_mul_ps(x, y)
#define F_FMA(x, y, z) _mm256_fmadd_ps(x, y, z)
#define F_LESS(x, y, z) _mm256_fnmadd_ps(x, y, z)
#define F_FROM_INT(x) _mm256_cvtepi32_ps(x)
#define F_FROM_F16(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define F_FROM_BF16(p)                                                                                                   \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))), 16))
#define QUAD_SUMS (VNNI && COLUMNS == 8)
#define I_DOT(q, x, s) DOT(q, x, s) /* the left factor is the unsigned one: there the input, here the weight */
#endif

#if !defined(__aarch64__)
#if QUAD_SUMS /* whole numbers are the unsigned factor of products, as they are */
#define OFFSET_OF(bits) 0
#define I_NUMBERS(x) (x)
#else
#define OFFSET_OF(bits) ((bits) == 8 ? 128 : 0)
#define I_NUMBERS(x) I_TOP(x)
#endif
#define from_f16(half) _cvtsh_ss(half)
#endif
