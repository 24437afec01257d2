/* Bring weights into the layout that the products read. */
#pragma once
#include "products.h"

typedef struct {
    const float *weight; /* [columns, depth] */
    char *out;
    long columns, depth;
    int kind;
    _Atomic int lossy;
} Packing;

/* A number's upper half, and whether the lower half held anything. */
INLINE uint32_t narrow(float v, uint32_t *lost) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    *lost |= bits & 0xffff;
    return bits >> 16;
}

static void pack_float(const Packing *p, long panel, uint32_t *lost) {
    long depth = p->depth, deep = (depth + 1) / 2;
    for (int c = 0; c < PANEL; c++) {
        long column = panel * PANEL + c;
        const float *w = p->weight + column * depth;
        uint32_t *out = (uint32_t *)(p->out + panel * float_stride(p->kind, depth)) + c;
        int real = column < p->columns;
        if (p->kind == BFLOAT16)
            for (long i = 0; i < deep; i++) {
                uint32_t low = real ? narrow(w[2 * i], lost) : 0;
                uint32_t high = real && 2 * i + 1 < depth ? narrow(w[2 * i + 1], lost) : 0;
                out[i * PANEL] = low | high << 16;
            }
        else
            for (long k = 0; k < depth; k++) {
                uint32_t bits = 0;
                if (real) memcpy(&bits, w + k, 4);
                out[k * PANEL] = bits;
            }
    }
}

static void pack_int8(const Packing *p, long panel) {
    long depth = p->depth, quads = quads_of(depth);
    char *out = p->out + panel * int8_stride(depth);
    float *scales = (float *)(out + (size_t)quads * ROW_BYTES);
    int32_t *starts = (int32_t *)(scales + groups_of(depth) * PANEL8);
    for (int c = 0; c < PANEL8; c++) {
        long column = panel * PANEL8 + c;
        for (long g = 0; g * GROUP < depth; g++) {
            long live = depth - g * GROUP < GROUP ? depth - g * GROUP : GROUP;
            int32_t bytes[GROUP] = {0}, sum = 0;
            float scale = column < p->columns ? quantise(p->weight + column * depth + g * GROUP, live, bytes) : 0;
            scales[g * PANEL8 + c] = scale;
            for (long i = 0; i < (live + 3) / 4 * 4; i++) {
                out[((g * GROUP_QUADS + i / 4) * PANEL8 + c) * 4 + i % 4] = (char)bytes[i];
                sum += bytes[i];
            }
            if (STARTS) starts[g * PANEL8 + c] = -128 * sum;
        }
    }
}

static void pack_panels(void *data, long begin, long end) {
    Packing *p = data;
    uint32_t lost = 0;
    for (long panel = begin; panel < end && !lost; panel++)
        if (p->kind == INT8) pack_int8(p, panel);
        else pack_float(p, panel, &lost);
    if (lost) atomic_store_explicit(&p->lossy, 1, memory_order_relaxed);
}
