/* Bring whole numbers in groups into the layout that the products read. */
#pragma once
#include "products.h"

/* What engine.compute.whole.groups.Groups has, dense; what there is none of is NULL. Layout shared with kernel_calls.py. */
typedef struct {
    const uint8_t *numbers; /* [columns, depth] */
    const char *scales, *supers, *minima, *minimum_supers, *zeros;
} GroupParts;

typedef struct {
    Format format;
    GroupParts parts;
    char *out;
    long columns, depth;
    _Atomic int too_large;
} GroupPacking;

/* Four numbers, of which some may be behind the end. */
INLINE uint32_t four_of(const uint8_t *numbers, long live) {
    uint32_t four = 0;
    if (live > 0) memcpy(&four, numbers, live < 4 ? (size_t)live : 4);
    return four;
}

/* A column's numbers of a block → its place in a vector. Returns the bits that do not fit. */
INLINE uint32_t pack_block(int bits, const uint8_t *numbers, long live, char *vector, int lane) {
    uint32_t *out = (uint32_t *)vector + lane, quads[STEP_QUADS], wrong = 0;
    for (int q = 0; q < STEP_QUADS; q++) quads[q] = four_of(numbers + 4 * q, live - 4 * q);
    for (int q = 0; q < STEP_QUADS; q++) wrong |= quads[q] & ~(UINT32_C(0x01010101) * ((1u << bits) - 1));
    if (bits == 8)
        for (int q = 0; q < STEP_QUADS; q++) out[q * WIDTH] = quads[q];
    else
        for (int q = 0; q < STEP_QUADS; q += 2)
            out[q / 2 * WIDTH] = (quads[q] & 0x0f0f0f0f) | (quads[q + 1] & 0x0f0f0f0f) << 4;
    if (bits == 5) {
        uint32_t fifths = 0;
        for (int q = 0; q < STEP_QUADS; q++) fifths |= (quads[q] >> 4 & 0x01010101) << q;
        out[4 * WIDTH] = fifths;
    }
    if (bits == 6)
        for (int i = 0; i < 2; i++) {
            uint32_t upper = 0;
            for (int q = 0; q < 4; q++) upper |= (quads[4 * i + q] >> 4 & 0x03030303) << 2 * q;
            out[(4 + i) * WIDTH] = upper;
        }
    return wrong;
}

/* A column's values of some groups, `size` bytes each, of which a column has `all`. */
INLINE void pack_part(char *out, int place, size_t size, const char *from, long column, long all, long first, long count) {
    for (long g = 0; size && g < count; g++)
        memcpy(out + (g * PANEL_G + place) * size, from + (column * all + first + g) * size, size);
}

static uint32_t pack_group_panel(const GroupPacking *p, long panel) {
    const Format *f = &p->format;
    const GroupParts *parts = &p->parts;
    long groups = (p->depth + f->group - 1) / f->group, supers = (groups + f->per - 1) / f->per;
    char *out = p->out + (size_t)panel * grouped_stride(f, p->depth);
    uint32_t wrong = 0;
    for (long k = 0; k < p->depth; k += CHUNK_K) {
        long live = p->depth - k < CHUNK_K ? p->depth - k : CHUNK_K, group = k / f->group, super = group / f->per;
        Chunk c = chunk_of(f, live);
        memset(out, 0, c.bytes);
        for (int place = 0; place < PANEL_G && panel * PANEL_G + place < p->columns; place++) {
            long column = panel * PANEL_G + place;
            char *vector = out + c.numbers + place / WIDTH * vector_bytes(f->bits);
            for (long i = 0; i < live; i += STEP_K, vector += 2 * vector_bytes(f->bits))
                wrong |= pack_block(f->bits, parts->numbers + column * p->depth + k + i, live - i, vector, place % WIDTH);
            pack_part(out + c.scales, place, part_size(f->scales), parts->scales, column, groups, group, c.groups);
            pack_part(out + c.supers, place, part_size(f->supers), parts->supers, column, supers, super, c.super_groups);
            pack_part(out + c.minima, place, part_size(f->minima), parts->minima, column, groups, group, c.groups);
            pack_part(out + c.minimum_supers, place, part_size(f->minimum_supers), parts->minimum_supers, column, supers,
                      super, c.super_groups);
            pack_part(out + c.zeros, place, part_size(f->zeros), parts->zeros, column, groups, group, c.groups);
        }
        out += c.bytes;
    }
    return wrong;
}

static void pack_group_panels(void *data, long begin, long end) {
    GroupPacking *p = data;
    uint32_t wrong = 0;
    for (long panel = begin; panel < end && !wrong; panel++) wrong = pack_group_panel(p, panel);
    if (wrong) atomic_store_explicit(&p->too_large, 1, memory_order_relaxed);
}
