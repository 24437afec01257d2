/* The names of grouped_vectors.h with NEON, and the rounding of an input's 32 numbers.
 *
 * SDOT takes signed bytes on either side: numbers of up to 6 bits are such, and 128 is taken off those of 8 bits and off their
 * zeros (OFFSET_OF), which leaves number - zero as it was. */
#pragma once
#include "int8_products.h"

#define WIDTH 8
#define QUAD_SUMS 1
#define OFFSET_OF(bits) ((bits) == 8 ? 128 : 0)
typedef vi wi;
typedef vf wf;

INLINE wi I_LOAD(const void *p) { return QUADS((const char *)p); }
INLINE void I_STORE(void *p, wi x) { vst1q_s32((int32_t *)p, x.low), vst1q_s32((int32_t *)p + 4, x.high); }
INLINE wi I_QUAD(const void *p) { return INPUT((const char *)p); }
INLINE wi I_OF(int32x4_t x) { return (wi){x, x}; }
INLINE wi I_SET8(int x) { return I_OF(vreinterpretq_s32_s8(vdupq_n_s8((int8_t)x))); }
INLINE wi I_SET16(int x) { return I_OF(vreinterpretq_s32_s16(vdupq_n_s16((int16_t)x))); }
INLINE wi I_ZERO(void) { return I_OF(vdupq_n_s32(0)); }
INLINE wi I_AND(wi x, wi y) { return (wi){vandq_s32(x.low, y.low), vandq_s32(x.high, y.high)}; }
INLINE wi I_OR(wi x, wi y) { return (wi){vorrq_s32(x.low, y.low), vorrq_s32(x.high, y.high)}; }
INLINE wi I_SUB32(wi x, wi y) { return (wi){vsubq_s32(x.low, y.low), vsubq_s32(x.high, y.high)}; }
INLINE wi I_TIMES(wi x, wi y) { return (wi){vmulq_s32(x.low, y.low), vmulq_s32(x.high, y.high)}; }
INLINE wi I_DOT(wi q, wi x, wi s) { return DOT(x, q, s); }
/* Numbers of 8 bits as SDOT takes them. */
INLINE wi I_NUMBERS(wi x) {
    int32x4_t top = vreinterpretq_s32_u8(vdupq_n_u8(128));
    return (wi){veorq_s32(x.low, top), veorq_s32(x.high, top)};
}
/* Of 16 bits, as on x86: who shifts bytes masks them afterwards. */
INLINE int32x4_t left4(int32x4_t x, int n) { return vreinterpretq_s32_u16(vreinterpretq_u16_s32(x) << n); }
INLINE int32x4_t right4(int32x4_t x, int n) { return vreinterpretq_s32_u16(vreinterpretq_u16_s32(x) >> n); }
INLINE wi I_LEFT(wi x, int n) { return (wi){left4(x.low, n), left4(x.high, n)}; }
INLINE wi I_RIGHT(wi x, int n) { return (wi){right4(x.low, n), right4(x.high, n)}; }
INLINE wi I_FROM_U8(const void *p) {
    uint16x8_t v = vmovl_u8(vld1_u8((const uint8_t *)p));
    return (wi){vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(v))), vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(v)))};
}
INLINE wi I_FROM_S8(const void *p) {
    int16x8_t v = vmovl_s8(vld1_s8((const int8_t *)p));
    return (wi){vmovl_s16(vget_low_s16(v)), vmovl_s16(vget_high_s16(v))};
}

INLINE wf F_LOAD(const void *p) { return LOAD((const float *)p); }
INLINE void F_STORE(float *p, wf x) { STORE(p, x); }
INLINE wf F_SET(float x) { return SET(x); }
INLINE wf F_MUL(wf x, wf y) { return MUL(x, y); }
INLINE wf F_FMA(wf x, wf y, wf z) { return FMA(x, y, z); }
INLINE wf F_LESS(wf x, wf y, wf z) { return (wf){vfmsq_f32(z.low, x.low, y.low), vfmsq_f32(z.high, x.high, y.high)}; }
INLINE wf F_FROM_INT(wi x) { return (wf){vcvtq_f32_s32(x.low), vcvtq_f32_s32(x.high)}; }
INLINE float32x4_t from_f16_4(const char *p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8((const uint8_t *)p))); }
INLINE float32x4_t from_bf16_4(const char *p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8((const uint8_t *)p)), 16));
}
INLINE wf F_FROM_F16(const char *p) { return (wf){from_f16_4(p), from_f16_4(p + 8)}; }
INLINE wf F_FROM_BF16(const char *p) { return (wf){from_bf16_4(p), from_bf16_4(p + 8)}; }

INLINE float from_f16(uint16_t half) {
    __fp16 value;
    memcpy(&value, &half, 2);
    return (float)value;
}

INLINE int16x8_t shorts8(vf v) {
    return vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(v.low)), vqmovn_s32(vcvtnq_s32_f32(v.high)));
}

/* 32 numbers → 8 quads of bytes, the sums of the first and of the last 16 bytes, and the scale: see quantise_step. */
INLINE float round_step(const float *x, int32_t *quads, int32_t *sums) {
    vf v0 = LOAD(x), v1 = LOAD(x + 8), v2 = LOAD(x + 16), v3 = LOAD(x + 24);
    vf most = MAX(MAX(ABS(v0), ABS(v1)), MAX(ABS(v2), ABS(v3)));
    vf odd = ADD(ADD(SUB(v0, v0), SUB(v1, v1)), ADD(SUB(v2, v2), SUB(v3, v3)));
    float32x4_t most4 = max4(most.low, most.high);
    most4 = max4(most4, vextq_f32(most4, most4, 2));
    float a = vgetq_lane_f32(most4, 0), b = vgetq_lane_f32(most4, 1), largest = a > b ? a : b;
    float wrong = vaddvq_f32(vaddq_f32(odd.low, odd.high)); /* 0 or NaN */
    float inverse = largest > 0 ? 127.0f / largest : 0;
    if (!(inverse <= 3.0e38f)) inverse = 0;
    vf by = SET(inverse);
    int8x16_t first = vcombine_s8(vqmovn_s16(shorts8(MUL(v0, by))), vqmovn_s16(shorts8(MUL(v1, by))));
    int8x16_t last = vcombine_s8(vqmovn_s16(shorts8(MUL(v2, by))), vqmovn_s16(shorts8(MUL(v3, by))));
    vst1q_s32(quads, vreinterpretq_s32_s8(first)), vst1q_s32(quads + 4, vreinterpretq_s32_s8(last));
    sums[0] = vaddlvq_s8(first), sums[1] = vaddlvq_s8(last);
    return inverse > 0 ? largest / 127.0f + wrong : wrong;
}
