/* The numbers that a packed weight stands for, for an embedding's rows and for comparisons. */
#pragma once
#include "grouped_packing.h"

typedef struct {
    const Matrix *matrix;
    const int64_t *columns; /* [count], or NULL: the first ones */
    float *out;             /* [count, depth] */
    long depth;
} Widening;

static void widen_float(const Matrix *m, long depth, long column, float *out) {
    const uint32_t *w = (const uint32_t *)(m->weight + column / PANEL * float_stride(m->kind, depth)) + column % PANEL;
    for (long k = 0; k < depth; k++) {
        uint32_t bits = m->kind == FLOAT32 ? w[k * PANEL] : k & 1 ? w[k / 2 * PANEL] & 0xffff0000 : w[k / 2 * PANEL] << 16;
        memcpy(out + k, &bits, 4);
    }
}

static void widen_int8(const Matrix *m, long depth, long column, float *out) {
    const char *panel = m->weight + column / PANEL8 * int8_stride(depth);
    const float *scales = (const float *)(panel + (size_t)quads_of(depth) * ROW_BYTES) + column % PANEL8;
    const int8_t *bytes = (const int8_t *)panel + column % PANEL8 * 4;
    for (long k = 0; k < depth; k++) out[k] = (float)bytes[k / 4 * ROW_BYTES + k % 4] * scales[k / GROUP * PANEL8];
}

/* Value i of a part. */
INLINE float value_at(int kind, const char *at, long i) {
    uint16_t half;
    uint32_t bits;
    float whole;
    switch (kind) {
        case F16: memcpy(&half, at + i * 2, 2); return from_f16(half);
        case BF16: memcpy(&half, at + i * 2, 2); bits = (uint32_t)half << 16; memcpy(&whole, &bits, 4); return whole;
        case F32: memcpy(&whole, at + i * 4, 4); return whole;
        case U8: return (float)(uint8_t)at[i];
        default: return (float)(int8_t)at[i];
    }
}

INLINE float product_at(int kind, int super_kind, const char *at, const char *supers, long group, long super, long place) {
    float value = value_at(kind, at, group * PANEL_G + place);
    return super_kind ? value * value_at(super_kind, supers, super * PANEL_G + place) : value;
}

/* A column's numbers of a block. */
INLINE void unpack_block(int bits, const char *vector, int lane, uint8_t numbers[STEP_K]) {
    const uint32_t *from = (const uint32_t *)vector + lane;
    for (int q = 0; q < STEP_QUADS; q++) {
        uint32_t quad = bits == 8 ? from[q * WIDTH] : from[q / 2 * WIDTH] >> 4 * (q & 1) & 0x0f0f0f0f;
        if (bits == 5) quad |= (from[4 * WIDTH] >> q & 0x01010101) << 4;
        if (bits == 6) quad |= (from[(4 + q / 4) * WIDTH] >> 2 * (q % 4) & 0x03030303) << 4;
        memcpy(numbers + 4 * q, &quad, 4);
    }
}

static void widen_grouped(const Matrix *m, long depth, long column, float *out) {
    const Format *f = m->format;
    long place = column % PANEL_G, shared = f->group < STEP_K ? f->group : STEP_K;
    const char *w = m->weight + (size_t)(column / PANEL_G) * grouped_stride(f, depth);
    for (long k = 0; k < depth; k += CHUNK_K) {
        long live = depth - k < CHUNK_K ? depth - k : CHUNK_K;
        Chunk c = chunk_of(f, live);
        const char *vector = w + c.numbers + place / WIDTH * vector_bytes(f->bits);
        for (long i = 0; i < live; i += STEP_K, vector += 2 * vector_bytes(f->bits)) {
            uint8_t numbers[STEP_K];
            unpack_block(f->bits, vector, (int)(place % WIDTH), numbers);
            for (long j = 0; j < STEP_K && i + j < live; j += shared) {
                long group = (i + j) / f->group, super = group / f->per;
                int zero = f->zeros ? (uint8_t)w[c.zeros + (size_t)(group * PANEL_G + place)] : f->zero;
                float scale = product_at(f->scales, f->supers, w + c.scales, w + c.supers, group, super, place), minimum = 0;
                if (f->minima)
                    minimum = product_at(f->minima, f->minimum_supers, w + c.minima, w + c.minimum_supers, group, super, place);
                long stop = live - i < j + shared ? live - i : j + shared;
                for (long n = j; n < stop; n++) {
                    float number = (float)(numbers[n] - zero) * scale;
                    out[k + i + n] = f->minima ? number - minimum : number;
                }
            }
        }
        w += c.bytes;
    }
}

static void widen_columns(void *data, long begin, long end) {
    const Widening *w = data;
    for (long i = begin; i < end; i++) {
        long column = w->columns ? w->columns[i] : i;
        float *out = w->out + i * w->depth;
        if (w->matrix->kind == GROUPED) widen_grouped(w->matrix, w->depth, column, out);
        else if (w->matrix->kind == INT8) widen_int8(w->matrix, w->depth, column, out);
        else widen_float(w->matrix, w->depth, column, out);
    }
}
