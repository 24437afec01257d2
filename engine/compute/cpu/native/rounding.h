/* Round floats to whole numbers in groups of 32: the bits of engine/compute/whole/rounding.py, which says what is computed
 * and why. One operation of IEEE 754 for each of torch's, sums in pairs of halves, so vectors of any width give them. */
#pragma once
#include "products.h"

enum { ROUNDED = 32, ROUNDED_PER = 8, ROUNDED_FITS = 2 };

/* What is rounded, and where its parts go, dense. Layout shared with kernel_calls.py. */
typedef struct {
    const float *weight;  /* [columns, depth] */
    uint8_t *numbers;     /* [columns, depth] */
    uint8_t *scales, *minima;          /* [columns, groups]; minima are for 4 bits */
    uint16_t *supers, *minimum_supers; /* [columns, super-groups] bfloat16 */
    long columns, depth;
    int bits;
    _Atomic int infinite;
} Rounding;

typedef struct {
    float x[ROUNDED], q[ROUNDED];
} RoundedGroup;

#define EACH(i) for (int i = 0; i < ROUNDED; i += LANES)

/* A group of a row, filled up with zeros. Returns whether a number is not finite. */
INLINE int take_group(const float *row, long live, float *x) {
    uint32_t largest = 0;
    live = live < 0 ? 0 : live < ROUNDED ? live : ROUNDED;
    if (live < ROUNDED) memset(x, 0, ROUNDED * sizeof *x);
    memcpy(x, row, (size_t)live * sizeof *x);
    for (int i = 0; i < ROUNDED; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    return largest >= 0x7f800000;
}

/* Half to half: 32 → 16 → 8 → … */
INLINE float sum_of(const float *p) {
    float half[ROUNDED / 2];
    for (int i = 0; i < ROUNDED / 2; i += LANES) STORE(half + i, ADD(LOAD(p + i), LOAD(p + i + ROUNDED / 2)));
    return tree(half);
}

/* The largest of 32 numbers and `least`. */
INLINE float top_of(const float *p, float least) {
    float half[ROUNDED / 2];
    for (int i = 0; i < ROUNDED / 2; i += LANES) STORE(half + i, MAX(LOAD(p + i), LOAD(p + i + ROUNDED / 2)));
    return largest_of(half, least);
}

INLINE float inverse_of(float scale) { return scale > 1e-30f ? 1 / scale : 0; }

/* A float that is not below 0, up to bfloat16. */
INLINE uint16_t up(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return (uint16_t)((bits + 0xffff) >> 16);
}

INLINE float of_bfloat16(uint16_t upper) {
    uint32_t bits = (uint32_t)upper << 16;
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

/* The nearest whole number from `least` to `most`. */
INLINE vf whole_number(vf v, float least, float most) {
    vf above = MAX(ROUND(v), SET(least));
    return SUB(ZERO(), MAX(SUB(ZERO(), above), SET(-most)));
}

/* q = the whole numbers 0 … 15 nearest to (x - low) / scale. */
INLINE void round_four(const float *x, float *q, float scale, float low) {
    float inverse = inverse_of(scale);
    EACH(i) STORE(q + i, whole_number(MUL(SUB(LOAD(x + i), SET(low)), SET(inverse)), 0, 15));
}

/* The scale and the low that come nearest to x with these q; they stay where there are none (`_fit`). */
INLINE void fit(const RoundedGroup *g, float total, float *scale, float *low) {
    float squared[ROUNDED], times[ROUNDED];
    EACH(i) {
        vf q = LOAD(g->q + i);
        STORE(squared + i, MUL(q, q));
        STORE(times + i, MUL(LOAD(g->x + i), q));
    }
    float ones = sum_of(g->q), squares = sum_of(squared), products = sum_of(times);
    float spread = ROUNDED * squares - ones * ones;
    float fitted = (ROUNDED * products - ones * total) / spread;
    float base = (total - fitted * ones) / ROUNDED;
    if (base > 0) fitted = products / squares, base = 0;
    if (!(spread > 0 && fitted > 0 && __builtin_isfinite(fitted) && __builtin_isfinite(base))) return;
    *scale = fitted, *low = base;
}

/* The sum of squared differences. */
INLINE float error_of(const RoundedGroup *g, float scale, float low) {
    float off[ROUNDED];
    EACH(i) {
        vf d = SUB(ADD(MUL(LOAD(g->q + i), SET(scale)), SET(low)), LOAD(g->x + i));
        STORE(off + i, MUL(d, d));
    }
    return sum_of(off);
}

/* The scale of a group, and what 0 stands for, which is not above 0 (`_fitted`). */
static void fit_group(RoundedGroup *g, float *scale, float *low) {
    static const float shrink[] = {1.0f, 0.88f};
    float minus[ROUNDED], best = 0;
    EACH(i) STORE(minus + i, SUB(ZERO(), LOAD(g->x + i)));
    float lowest = -top_of(minus, 0), step = top_of(g->x, lowest) / 15 - lowest / 15, total = sum_of(g->x);
    for (int way = 0; way < 2; way++) {
        float wide = step * shrink[way], base = lowest * shrink[way];
        for (int times = 0; times < ROUNDED_FITS; times++) {
            round_four(g->x, g->q, wide, base);
            fit(g, total, &wide, &base);
        }
        float error = error_of(g, wide, base);
        if (way == 0 || error < best) best = error, *scale = wide, *low = base;
    }
}

/* Eight values, none below 0, as bytes, and the bfloat16 that they multiply. */
INLINE uint16_t in_bytes(const float *values, uint8_t *bytes) {
    float largest = 0;
    for (int i = 0; i < ROUNDED_PER; i++) largest = values[i] > largest ? values[i] : largest;
    uint16_t super = up(largest / 255);
    float inverse = inverse_of(of_bfloat16(super));
    for (int i = 0; i < ROUNDED_PER; i++) {
        float v = __builtin_rintf(values[i] * inverse);
        bytes[i] = (uint8_t)(v < 0 ? 0 : v > 255 ? 255 : v);
    }
    return super;
}

INLINE long rounded_groups(long depth) { return (depth + ROUNDED - 1) / ROUNDED; }
INLINE long rounded_supers(long depth) { return (rounded_groups(depth) + ROUNDED_PER - 1) / ROUNDED_PER; }

/* The eight groups of a row that have a super-scale, or those of them that there are. Returns how many; -1 if a number is not
 * finite. */
INLINE long take_groups(const Rounding *r, long column, long super, RoundedGroup *all) {
    long first = super * ROUNDED_PER, count = rounded_groups(r->depth) - first;
    int infinite = 0;
    if (count > ROUNDED_PER) count = ROUNDED_PER;
    for (long i = 0; i < count; i++) {
        long at = (first + i) * ROUNDED;
        infinite |= take_group(r->weight + column * r->depth + at, r->depth - at, all[i].x);
    }
    return infinite ? -1 : count;
}

INLINE void keep_numbers(const Rounding *r, long column, long group, const float *q) {
    long at = group * ROUNDED;
    for (long k = 0; k < ROUNDED && at + k < r->depth; k++) r->numbers[column * r->depth + at + k] = (uint8_t)q[k];
}

static int round_row_four(const Rounding *r, long column) {
    long groups = rounded_groups(r->depth), supers = rounded_supers(r->depth);
    RoundedGroup all[ROUNDED_PER];
    for (long super = 0; super < supers; super++) {
        long first = super * ROUNDED_PER, count = take_groups(r, column, super, all);
        float scales[ROUNDED_PER] = {0}, minima[ROUNDED_PER] = {0};
        uint8_t scale_bytes[ROUNDED_PER], minimum_bytes[ROUNDED_PER];
        if (count < 0) return 1;
        for (long i = 0; i < count; i++) {
            fit_group(&all[i], &scales[i], &minima[i]);
            minima[i] = -minima[i];
        }
        uint16_t scale = in_bytes(scales, scale_bytes), minimum = in_bytes(minima, minimum_bytes);
        r->supers[column * supers + super] = scale, r->minimum_supers[column * supers + super] = minimum;
        for (long i = 0; i < count; i++) {
            r->scales[column * groups + first + i] = scale_bytes[i], r->minima[column * groups + first + i] = minimum_bytes[i];
            round_four(all[i].x, all[i].q, scale_bytes[i] * of_bfloat16(scale), -(minimum_bytes[i] * of_bfloat16(minimum)));
            keep_numbers(r, column, first + i, all[i].q);
        }
    }
    return 0;
}

static int round_row_six(const Rounding *r, long column) {
    long groups = rounded_groups(r->depth), supers = rounded_supers(r->depth);
    RoundedGroup all[ROUNDED_PER];
    for (long super = 0; super < supers; super++) {
        long first = super * ROUNDED_PER, count = take_groups(r, column, super, all);
        float scales[ROUNDED_PER] = {0};
        uint8_t bytes[ROUNDED_PER];
        if (count < 0) return 1;
        for (long i = 0; i < count; i++) {
            EACH(k) STORE(all[i].q + k, ABS(LOAD(all[i].x + k)));
            scales[i] = top_of(all[i].q, 0) / 31;
        }
        uint16_t scale = in_bytes(scales, bytes);
        r->supers[column * supers + super] = scale;
        for (long i = 0; i < count; i++) {
            float inverse = inverse_of(bytes[i] * of_bfloat16(scale));
            r->scales[column * groups + first + i] = bytes[i];
            EACH(k) STORE(all[i].q + k, ADD(whole_number(MUL(LOAD(all[i].x + k), SET(inverse)), -31, 31), SET(32)));
            keep_numbers(r, column, first + i, all[i].q);
        }
    }
    return 0;
}

static void round_rows(void *data, long begin, long end) {
    Rounding *r = data;
    int infinite = 0;
    for (long column = begin; column < end && !infinite; column++)
        infinite = r->bits == 4 ? round_row_four(r, column) : round_row_six(r, column);
    if (infinite) atomic_store_explicit(&r->infinite, 1, memory_order_relaxed);
}
