/* The names of quads.h with NEON: signed bytes on either side, four columns to a register. */
#pragma once
#include "vectors.h"

#if defined(__ARM_FEATURE_MATMUL_INT8)
#define I8MM 1
#else
#define I8MM 0
#endif
#define STARTS 0
#define WHOLE_COLUMNS 1
#define COLUMNS 8
#define QUAD_BYTES 4

typedef struct {
    int32x4_t low, high;
} vi;

INLINE int32x4_t bytes16(const char *p) { return vreinterpretq_s32_s8(vld1q_s8((const int8_t *)p)); }
INLINE vi QUADS(const char *p) { return (vi){bytes16(p), bytes16(p + 16)}; }
INLINE vi INPUT(const char *p) {
    int32_t quad;
    memcpy(&quad, p, 4);
    return (vi){vdupq_n_s32(quad), vdupq_n_s32(quad)};
}
#define SUM_START(p) (vi){vdupq_n_s32(0), vdupq_n_s32(0)}

/* s + the sums of four products each. */
INLINE int32x4_t dot4(int32x4_t s, int32x4_t x, int32x4_t w) {
    int8x16_t a = vreinterpretq_s8_s32(x), b = vreinterpretq_s8_s32(w);
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(s, a, b);
#else
    /* Two products of the input's -127 … 127 and a byte are less than 2^15: their sum fits in 16 bits. */
    int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
    return vpadalq_s16(s, vpaddq_s16(low, high));
#endif
}
INLINE vi DOT(vi x, vi w, vi s) { return (vi){dot4(s.low, x.low, w.low), dot4(s.high, x.high, w.high)}; }

/* Four numbers of -127 … 127 → one quad of an input. */
INLINE void put_quad(char *to, const int32_t *from) {
    int16x4_t half = vmovn_s32(vld1q_s32(from));
    int32x2_t quad = vreinterpret_s32_s8(vmovn_s16(vcombine_s16(half, half)));
    int32_t word = vget_lane_s32(quad, 0);
    memcpy(to, &word, 4);
}
