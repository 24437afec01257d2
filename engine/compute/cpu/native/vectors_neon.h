/* The names of vectors.h with NEON: two registers of four numbers, so that panels and blocks are those of AVX2. */
#pragma once
#include <arm_neon.h>

#define PREFETCH(p) __builtin_prefetch(p, 0, 3)

#define LANES 8
typedef struct {
    float32x4_t low, high;
} vf;

INLINE vf SET(float x) { return (vf){vdupq_n_f32(x), vdupq_n_f32(x)}; }
INLINE vf ZERO(void) { return SET(0); }
INLINE vf LOAD(const float *p) { return (vf){vld1q_f32(p), vld1q_f32(p + 4)}; }
INLINE void STORE(float *p, vf v) { vst1q_f32(p, v.low), vst1q_f32(p + 4, v.high); }
INLINE vf FMA(vf a, vf b, vf c) { return (vf){vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)}; }
INLINE vf ADD(vf a, vf b) { return (vf){vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
INLINE vf SUB(vf a, vf b) { return (vf){vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
INLINE vf MUL(vf a, vf b) { return (vf){vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
INLINE vf DIV(vf a, vf b) { return (vf){vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
INLINE vf ABS(vf a) { return (vf){vabsq_f32(a.low), vabsq_f32(a.high)}; }
INLINE vf MINUS_ABS(vf a) { return (vf){vnegq_f32(vabsq_f32(a.low)), vnegq_f32(vabsq_f32(a.high))}; }
INLINE vf ROUND(vf a) { return (vf){vrndnq_f32(a.low), vrndnq_f32(a.high)}; }

/* Not FMAX, which has another opinion of NaN and of zeros' signs than other processors' instructions. */
INLINE float32x4_t max4(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
INLINE vf MAX(vf a, vf b) { return (vf){max4(a.low, b.low), max4(a.high, b.high)}; }

INLINE vf NEGATIVE(vf a, vf yes, vf no) {
    return (vf){vbslq_f32(vcltzq_f32(a.low), yes.low, no.low), vbslq_f32(vcltzq_f32(a.high), yes.high, no.high)};
}

INLINE float32x4_t power_of_two4(float32x4_t n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23));
}
INLINE vf POWER_OF_TWO(vf n) { return (vf){power_of_two4(n.low), power_of_two4(n.high)}; }

INLINE float32x4_t unless_below4(float32x4_t x, float32x4_t least, float32x4_t v) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(v), vcltq_f32(x, least)));
}
INLINE vf UNLESS_BELOW(vf x, float least, vf v) {
    return (vf){unless_below4(x.low, vdupq_n_f32(least), v.low), unless_below4(x.high, vdupq_n_f32(least), v.high)};
}

INLINE void STORE_WHOLE(int32_t *p, vf v) { vst1q_s32(p, vcvtnq_s32_f32(v.low)), vst1q_s32(p + 4, vcvtnq_s32_f32(v.high)); }

INLINE uint32x4_t words4(const void *p) { return vreinterpretq_u32_u8(vld1q_u8(p)); }
INLINE float32x4_t low_half4(const char *p) { return vreinterpretq_f32_u32(vshlq_n_u32(words4(p), 16)); }
INLINE float32x4_t high_half4(const char *p) {
    return vreinterpretq_f32_u32(vandq_u32(words4(p), vdupq_n_u32(0xffff0000)));
}
INLINE vf LOW_HALF(const char *p) { return (vf){low_half4(p), low_half4(p + 16)}; }
INLINE vf HIGH_HALF(const char *p) { return (vf){high_half4(p), high_half4(p + 16)}; }

/* Sixteen numbers summed as a tree: i and i + 8, then i and i + 4, … */
INLINE float tree(const float *p) {
    vf v = ADD(LOAD(p), LOAD(p + 8));
    float32x4_t u = vaddq_f32(v.low, v.high);
    float32x2_t t = vadd_f32(vget_low_f32(u), vget_high_f32(u));
    return vget_lane_f32(t, 0) + vget_lane_f32(t, 1);
}

/* The largest of sixteen numbers and `least`. */
INLINE float largest_of(const float *p, float least) {
    vf v = MAX(LOAD(p), LOAD(p + 8));
    float32x4_t u = max4(v.low, v.high);
    u = max4(u, vextq_f32(u, u, 2));
    float a = vgetq_lane_f32(u, 0), b = vgetq_lane_f32(u, 1), found = a > b ? a : b;
    return found > least ? found : least;
}
