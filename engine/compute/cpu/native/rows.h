/* What is done to a row by itself: norms, activations, rotary embedding. */
#pragma once
#include "attention.h"

/* Layout shared with engine/compute/cpu/kernel_calls.py. */
typedef struct {
    const float *weight; /* [dim]; NULL: there is no such norm */
    float epsilon;
    int centred; /* the mean is taken off first: LayerNorm without a bias, not an RMS norm */
} Norm;

/* The sum of x, or of (x - mean)²: in 16 chains, and these as a tree. */
INLINE float row_sum(const float *x, long dim, float mean, int squared) {
    float partial[KEYS] = {0};
    long whole = dim / KEYS * KEYS;
    vf low = ZERO(), high = ZERO(), m = SET(mean);
    for (long i = 0; i < whole; i += KEYS) {
        vf a = SUB(LOAD(x + i), m);
        low = squared ? FMA(a, a, low) : ADD(low, a);
        if (LANES == 8) {
            vf b = SUB(LOAD(x + i + KEYS / 2), m);
            high = squared ? FMA(b, b, high) : ADD(high, b);
        }
    }
    STORE(partial, low);
    if (LANES == 8) STORE(partial + KEYS / 2, high);
    for (long i = whole; i < dim; i++) {
        float a = x[i] - mean, *to = partial + i - whole;
        *to = squared ? __builtin_fmaf(a, a, *to) : *to + a;
    }
    return tree(partial);
}

/* out = weight * (x - mean) / sqrt(mean((x - mean)²) + epsilon) (Ba et al., 2016), with 0 for the inner mean unless the norm is
 * centred (Zhang and Sennrich, 2019). out may be x. */
static void norm_row(const float *x, const Norm *norm, float *out, long dim) {
    const float *weight = norm->weight;
    float mean = norm->centred ? row_sum(x, dim, 0, 0) / (float)dim : 0;
    float scale = 1.0f / __builtin_sqrtf(row_sum(x, dim, mean, 1) / (float)dim + norm->epsilon);
    for (long i = 0; i < dim; i++) out[i] = weight[i] * ((x[i] - mean) * scale);
}

/* Numbers shared with engine/compute/cpu/kernel_calls.py. */
enum { SILU = 0, GELU_TANH = 1, CLAMPED = 2 };

/* x / (1 + exp(-z)), by exp of numbers up to 0 only. SiLU (Elfwing et al., 2017): z = x. GELU in its tanh form (Hendrycks and
 * Gimpel, 2016): x (1 + tanh(z / 2)) / 2 is the same, z = x * fma(x * x, 0.044715 * √(8 / π), √(8 / π)). CLAMPED (gpt-oss's):
 * min(x, 7) for x, z = 1.702 x; and what it is multiplied with is cut to -7 … 7, plus 1. NaN stays. */
INLINE vf cut(vf x) { return NEGATIVE(SUB(SET(7.0f), x), SET(7.0f), x); }

INLINE vf activated(int kind, vf x) {
    if (kind == CLAMPED) x = cut(x);
    vf z = kind == CLAMPED ? MUL(x, SET(1.702f)) : kind == GELU_TANH ? MUL(x, FMA(MUL(x, x), SET(0.07135481627f), SET(1.595769122f))) : x;
    vf e = exponential(MINUS_ABS(z));
    return DIV(NEGATIVE(x, MUL(x, e), x), ADD(e, SET(1.0f)));
}

INLINE vf gated(int kind, vf x, vf by) {
    if (kind == CLAMPED) by = ADD(NEGATIVE(ADD(by, SET(7.0f)), SET(-7.0f), cut(by)), SET(1.0f));
    return MUL(activated(kind, x), by);
}

/* out = activation of x, times `by` if there is one; `count` numbers. out may be x. */
INLINE void activate_all(int kind, const float *x, const float *by, float *out, long count) {
    long i = 0;
    for (; i + LANES <= count; i += LANES) {
        STORE(out + i, by ? gated(kind, LOAD(x + i), LOAD(by + i)) : activated(kind, LOAD(x + i)));
    }
    if (i < count) {
        float rest[LANES] = {0}, other[LANES] = {0};
        memcpy(rest, x + i, (size_t)(count - i) * 4);
        if (by) memcpy(other, by + i, (size_t)(count - i) * 4);
        STORE(rest, by ? gated(kind, LOAD(rest), LOAD(other)) : activated(kind, LOAD(rest)));
        memcpy(out + i, rest, (size_t)(count - i) * 4);
    }
}

static void activate(int kind, const float *x, const float *by, float *out, long count) {
    if (kind == GELU_TANH) activate_all(GELU_TANH, x, by, out, count);
    else if (kind == CLAMPED) activate_all(CLAMPED, x, by, out, count);
    else activate_all(SILU, x, by, out, count);
}

/* Which numbers of a head are rotated together, and by which cos and sin. Numbers shared with
 * engine/compute/cpu/kernel_calls.py. */
enum {
    HALVES = 0,         /* i and i + dim / 2, by those with the same numbers (GPT-NeoX, Llama) */
    NEIGHBOURS = 1,     /* 2i and 2i + 1, by those with the same numbers (GPT-J, Cohere) */
    NEIGHBOURS_HALF = 2, /* 2i and 2i + 1, both by the one with number i (GLM) */
    HALVES_HALF = 3     /* i and i + dim / 2, both by the one with number i; there are no others (gpt-oss) */
};

/* How many cos there are for `dim` numbers. */
INLINE long angles(long dim, int pairing) { return pairing == HALVES_HALF ? dim / 2 : dim; }

/* Rotary position embedding of one head, in place: its first `dim` numbers (Su et al., 2021). cos and sin [angles]. Products
 * are rounded before they are added. */
static void rotate(float *restrict x, const float *restrict cos, const float *restrict sin, long dim, int pairing) {
    long half = dim / 2;
    if (pairing == HALVES || pairing == HALVES_HALF) {
        long other = pairing == HALVES ? half : 0;
        for (long i = 0; i < half; i++) {
            float a = x[i], b = x[i + half];
            x[i] = a * cos[i] - b * sin[i];
            x[i + half] = b * cos[i + other] + a * sin[i + other];
        }
    } else {
        /* In two loops: as one, gcc makes alternating sums and differences of it, and fuses those (vfmaddsub) although
         * -ffp-contract=off forbids it. */
        float turned[WIDEST];
        int step = pairing == NEIGHBOURS ? 2 : 1, next = step - 1;
        for (long i = 0; i < half; i++) {
            turned[2 * i] = -x[2 * i + 1] * sin[step * i];
            turned[2 * i + 1] = x[2 * i] * sin[step * i + next];
        }
        for (long i = 0; i < half; i++) {
            x[2 * i] = x[2 * i] * cos[step * i] + turned[2 * i];
            x[2 * i + 1] = x[2 * i + 1] * cos[step * i + next] + turned[2 * i + 1];
        }
    }
}
