/* Products of one input with several matrices: laid out, then multiplied, each divided among threads. */
#pragma once
#include "float_products.h"
#include "grouped_products.h"
#include "matrix_products.h"
#include "team.h"

/* What a weight of this kind is multiplied with: weights of one product share it. */
INLINE int input_of(int kind) { return kind == BFLOAT16 ? FLOAT32 : kind; }

INLINE long panel_width(int kind) { return kind == INT8 ? PANEL8 : kind == GROUPED ? PANEL_G : PANEL; }
INLINE long panels_of(long columns, int kind) { return (columns + panel_width(kind) - 1) / panel_width(kind); }
INLINE size_t stride_of(int kind, const Format *f, long depth) {
    return kind == INT8 ? int8_stride(depth) : kind == GROUPED ? grouped_stride(f, depth) : float_stride(kind, depth);
}
INLINE long row_bytes(int kind, long depth) {
    return kind == INT8 ? (long)int8_row(depth) : kind == GROUPED ? (long)grouped_row(depth) : depth * 4;
}

/* Lay out a tile's rows for a product, k = from … to - 1. `from` is a multiple of DEEP. */
INLINE void lay_out(const Call *call, long row, int rows, long from, long to) {
#if MATRIX_UNIT
    if (call->tallest == MATRIX_ROWS) {
        if (call->kind == INT8) matrix_tile8(call, row, rows, from, to);
        else matrix_tile_g(call, row, rows, from, to);
        return;
    }
#endif
    if (call->kind == INT8) quantise_tile(call, row, rows, from, to);
    else if (call->kind == GROUPED) grouped_tile(call, row, rows, from, to);
    else if (call->rows > 1) interleave(call, row, rows, from, to); /* one float row is a tile as it stands */
}

/* Units of laying out: DEEP k's of one tile. */
INLINE long pieces_of(const Call *call) { return (call->depth + DEEP - 1) / DEEP; }
INLINE void piece_of(const Call *call, long unit, long *row, int *rows, long *from, long *to) {
    *row = tile_at(call, unit / pieces_of(call), rows);
    *from = unit % pieces_of(call) * DEEP, *to = *from + DEEP < call->depth ? *from + DEEP : call->depth;
}

static void lay_out_pieces(void *of, long begin, long end) {
    const Call *call = of;
    for (long unit = begin; unit < end; unit++) {
        long row, from, to;
        int rows;
        piece_of(call, unit, &row, &rows, &from, &to);
        lay_out(call, row, rows, from, to);
    }
}

/* A unit of some 1,000 numbers is not worth taking by itself. */
static Phase laying_out(Call *call) {
    int needed = call->kind != FLOAT32 || call->rows > 1;
    long least = call->rows < TALLEST ? TALLEST / larger(call->rows, 1) : 1;
    return (Phase){lay_out_pieces, call, needed ? tiles_of(call) * pieces_of(call) : 0, least};
}

/* sum = residual + out, for the columns of some panels. */
static void add_residual(const Call *call, long from, long to) {
    long columns = call->matrices->columns, width = panel_width(call->matrices->kind);
    long first = from * width, last = to * width < columns ? to * width : columns;
    for (long row = 0; row < call->rows; row++) {
        const float *x = call->residual + row * columns, *y = call->out + row * columns;
        float *sum = call->sum + row * columns;
        for (long i = first; i < last; i++) sum[i] = x[i] + y[i];
    }
}

/* Panels begin … end - 1 of one matrix. */
INLINE void multiply_panels(const Call *call, const Matrix *m, float *out, long begin, long end) {
#if MATRIX_UNIT
    if (call->tallest == MATRIX_ROWS) {
        if (m->kind == INT8) matrix_panels8(call, m, out, begin, end);
        else matrix_panels_g(call, m, out, begin, end);
        return;
    }
#endif
    if (m->kind == GROUPED) grouped_panels(call, m, out, begin, end);
    else if (m->kind == INT8) int8_panels(call, m, out, begin, end);
    else if (m->kind == BFLOAT16) float_panels(BFLOAT16, call, m, out, begin, end);
    else float_panels(FLOAT32, call, m, out, begin, end);
}

/* Panels begin … end - 1 of all matrices, one after the other. */
static void multiply(void *of, long begin, long end) {
    const Call *call = of;
    long first = 0;
    float *out = call->out;
    for (long i = 0; i < call->count; i++) {
        const Matrix *m = call->matrices + i;
        long panels = panels_of(m->columns, m->kind);
        long from = begin > first ? begin - first : 0, to = end < first + panels ? end - first : panels;
        if (from < to) multiply_panels(call, m, out, from, to);
        first += panels;
        out += call->rows * m->columns;
    }
    if (call->sum) add_residual(call, begin, end);
}

static Phase multiplying(Call *call) {
    const Matrix *m = call->matrices; /* others' panels are of about that size */
    if (!call->panels) return (Phase){multiply, call, 0, 1}; /* a layer without an MLP has none */
    long least = WORTH / (long)(stride_of(m->kind, m->format, call->depth) + 1) / larger(tiles_of(call), 1);
    return (Phase){multiply, call, call->panels, larger(least, 1)};
}

static Call call_of(const float *input, void *scratch, float *out, const Matrix *matrices, long rows, long depth, long count) {
    long panels = 0;
    for (long i = 0; i < count; i++) panels += panels_of(matrices[i].columns, matrices[i].kind);
    int kind = input_of(matrices->kind), moved = kind != FLOAT32 || rows > 1, tallest = TALLEST;
    if (kind != FLOAT32 && rows >= MATRIX_FROM && atomic_load_explicit(&matrix_unit, memory_order_relaxed)) tallest = MATRIX_ROWS;
    return (Call){input, moved ? scratch : (char *)input, out, matrices, rows, depth, count, panels, kind, tallest, NULL, NULL};
}
