/* What is done to a row by itself: norms, activations, rotary embedding. */
#pragma once
#include "attention.h"

/* out = weight * x / sqrt(mean(x²) + epsilon) (Zhang and Sennrich, 2019). The squares are summed in 16 chains, and these as a
 * tree. out may be x. */
static void norm_row(const float *x, const float *weight, float *out, long dim, float epsilon) {
    float partial[KEYS] = {0};
    long whole = dim / KEYS * KEYS;
    vf low = ZERO(), high = ZERO();
    for (long i = 0; i < whole; i += KEYS) {
        low = FMA(LOAD(x + i), LOAD(x + i), low);
        if (LANES == 8) high = FMA(LOAD(x + i + KEYS / 2), LOAD(x + i + KEYS / 2), high);
    }
    STORE(partial, low);
    if (LANES == 8) STORE(partial + KEYS / 2, high);
    for (long i = whole; i < dim; i++) partial[i - whole] = __builtin_fmaf(x[i], x[i], partial[i - whole]);
    float scale = 1.0f / __builtin_sqrtf(tree(partial) / (float)dim + epsilon);
    for (long i = 0; i < dim; i++) out[i] = weight[i] * (x[i] * scale);
}

/* x / (1 + exp(-x)) (Elfwing et al., 2017), by exp of numbers up to 0 only. */
INLINE vf silu(vf x) {
    vf e = exponential(MINUS_ABS(x));
    return DIV(NEGATIVE(x, MUL(x, e), x), ADD(e, SET(1.0f)));
}

/* out = silu(x), times `by` if there is one; numbers begin … end - 1. out may be x. */
static void silu_range(const float *x, const float *by, float *out, long begin, long end) {
    long i = begin;
    for (; i + LANES <= end; i += LANES) {
        vf v = silu(LOAD(x + i));
        STORE(out + i, by ? MUL(v, LOAD(by + i)) : v);
    }
    if (i < end) {
        float rest[LANES] = {0};
        memcpy(rest, x + i, (size_t)(end - i) * 4);
        STORE(rest, silu(LOAD(rest)));
        for (long j = 0; i < end; i++, j++) out[i] = by ? rest[j] * by[i] : rest[j];
    }
}

/* Rotary position embedding of one head, in place: its first `dim` numbers, i with i + dim / 2 (Su et al., 2021; the pairing
 * of GPT-NeoX). cos and sin [dim]. Products are rounded before they are added. */
static void rotate(float *restrict x, const float *restrict cos, const float *restrict sin, long dim) {
    long half = dim / 2;
    for (long i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}
