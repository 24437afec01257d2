/* Products of many rows on a processor's matrix unit: int8, and whole numbers in groups. The chain of a number is that of
 * int8_products.h and grouped_products.h, operation by operation: the unit makes only the sums of bytes, which are exact.
 *
 * Rows are laid out in tiles of up to 16, row by row instead of quad by quad; weights stay as they are packed. int8 weights are loaded as
 * they lie there; those in groups are brought to a byte each, a chunk of a panel at a time, for several tiles of rows. */
#pragma once
#include "grouped_products.h"
#include "matrix_tiles.h"

#if MATRIX_UNIT
/* Numbers of tiles, written out where an instruction names them: 0, 1 sums; 2 input; 3, 4 weights; 5, 6, 7 input and weights of what is
 * left of a depth. A panel has one or two tiles of columns. */
enum {
    COLUMNS8 = PANEL8 < TILE_ROWS ? PANEL8 : TILE_ROWS, /* columns of a tile */
    COLUMNS_G = PANEL_G < TILE_ROWS ? PANEL_G : TILE_ROWS,
    TWO8 = PANEL8 > COLUMNS8,
    TWO_G = PANEL_G > COLUMNS_G,
    AT_ONCE = 4 /* tiles of rows for which a chunk is brought to bytes once; their sums stay in the first-level cache */
};
_Static_assert(PANEL8 == COLUMNS8 * (1 + TWO8) && PANEL_G == COLUMNS_G * (1 + TWO_G), "a panel is one tile of columns or two");
_Static_assert(MATRIX_ROWS <= TILE_ROWS, "a tile of rows is a tile of the unit");
_Static_assert(GROUP % TILE_BYTES == 0, "only a depth's last group has a rest");

/* Shapes for tiles of `rows` rows: `depth` k's of an input, then `rest`, with `columns` of a weight. */
static void begin_shapes(int rows, int depth, int rest, int columns) {
    TileShapes shapes = {0};
    for (int t = 0; t < 2; t++) shape_tile(&shapes, t, rows, columns * 4);
    shape_tile(&shapes, 2, rows, depth);
    for (int t = 3; t < 5; t++) shape_tile(&shapes, t, depth / 4, columns * 4);
    if (rest) {
        shape_tile(&shapes, 5, rows, rest);
        for (int t = 6; t < 8; t++) shape_tile(&shapes, t, rest / 4, columns * 4);
    }
    tiles_begin(&shapes);
}

/* ---- int8 ---- */

/* Bytes of a laid out row: whole quads. */
INLINE long row_of_bytes(long depth) { return quads_of(depth) * 4; }

/* The same as quantise_tile: for each 64 k's, or the rest of a depth, [rows][64] bytes with a sign. Scales lie where they do there. */
static void matrix_tile8(const Call *call, long row, int rows, long from, long to) {
    long depth = call->depth, all = row_of_bytes(depth);
    char *tile = call->tiles + row * int8_row(depth);
    float *scales = (float *)(tile + (size_t)quads_of(depth) * QUAD_BYTES * rows);
    for (int r = 0; r < rows; r++)
        for (long k = from; k < to; k += GROUP) {
            int32_t whole[GROUP];
            long live = depth - k < GROUP ? depth - k : GROUP, end = all - k < GROUP ? all : k + GROUP;
            scales[k / GROUP * rows + r] = quantise(call->input + (row + r) * depth + k, live, whole);
            for (long at = k; at < end; at += TILE_BYTES) {
                long count = end - at < TILE_BYTES ? end - at : TILE_BYTES;
                int8_t *bytes = (int8_t *)tile + at * rows + r * count;
                for (long i = 0; i < count; i++) bytes[i] = (int8_t)whole[at - k + i];
            }
        }
}

/* k's of a group, of which `end - k` are 128 but for a depth's last: sums [rows][PANEL8] of the products of bytes. */
static void group_sums8(const char *x, int rows, const char *w, long k, long end, int32_t *sums) {
    TILE_ZERO(0);
    if (TWO8) TILE_ZERO(1);
    for (; end - k >= TILE_BYTES; k += TILE_BYTES) {
        TILE_LOAD(2, x + k * rows, TILE_BYTES);
        TILE_LOAD(3, w + k / 4 * ROW_BYTES, ROW_BYTES);
        TILE_ADD_SS(0, 2, 3);
        if (TWO8) {
            TILE_LOAD(4, w + k / 4 * ROW_BYTES + TILE_BYTES, ROW_BYTES);
            TILE_ADD_SS(1, 2, 4);
        }
    }
    if (k < end) {
        TILE_LOAD(5, x + k * rows, end - k);
        TILE_LOAD(6, w + k / 4 * ROW_BYTES, ROW_BYTES);
        TILE_ADD_SS(0, 5, 6);
        if (TWO8) {
            TILE_LOAD(7, w + k / 4 * ROW_BYTES + TILE_BYTES, ROW_BYTES);
            TILE_ADD_SS(1, 5, 7);
        }
    }
    TILE_STORE(0, sums, PANEL8 * 4);
    if (TWO8) TILE_STORE(1, sums + COLUMNS8, PANEL8 * 4);
}

/* A tile of rows by a panel over the whole depth. */
static void matrix_panel8(const char *x, int rows, const char *w, long depth, float *totals) {
    long all = row_of_bytes(depth);
    const float *x_scale = (const float *)(x + (size_t)quads_of(depth) * QUAD_BYTES * rows);
    const float *scales = (const float *)(w + (size_t)quads_of(depth) * ROW_BYTES);
    int32_t sums[TILE_ROWS * PANEL8];
    memset(totals, 0, sizeof(float) * (size_t)rows * PANEL8);
    for (long k = 0; k < all; k += GROUP, x_scale += rows, scales += PANEL8) {
        group_sums8(x, rows, w, k, all - k < GROUP ? all : k + GROUP, sums);
        for (int r = 0; r < rows; r++) {
            float *to = totals + r * PANEL8;
            for (int i = 0; i < PANEL8; i++)
                to[i] = __builtin_fmaf((float)sums[r * PANEL8 + i], x_scale[r] * scales[i], to[i]);
        }
    }
}

static void matrix_panels8(const Call *call, const Matrix *m, float *all, long begin, long end) {
    long depth = call->depth, group = panels_at_once(call->rows, int8_stride(depth));
    int shaped = 0, rest = (int)(row_of_bytes(depth) % TILE_BYTES);
    float totals[TILE_ROWS * PANEL8];
    for (long g = begin; g < end; g += group) {
        long stop = g + group < end ? g + group : end;
        for (long tile = 0; tile < tiles_of(call); tile++) {
            int rows;
            long row = tile_at(call, tile, &rows);
            if (rows != shaped) begin_shapes(shaped = rows, TILE_BYTES, rest, COLUMNS8);
            for (long p = g; p < stop; p++) {
                matrix_panel8(call->tiles + row * int8_row(depth), rows, m->weight + p * int8_stride(depth), depth, totals);
                finish8(rows, PANEL8, totals, m, all + row * m->columns, p * PANEL8);
            }
        }
    }
    tiles_end();
}

/* ---- whole numbers in groups ---- */

/* The same as grouped_tile, but a block is [rows][32] bytes. */
static void matrix_tile_g(const Call *call, long row, int rows, long from, long to) {
    long depth = call->depth;
    char *tile = call->tiles + row * grouped_row(depth), *facts = tile + (size_t)steps_of(depth) * STEP_K * rows;
    for (int r = 0; r < rows; r++)
        for (long k = from; k < to; k += STEP_K) {
            int32_t quads[STEP_QUADS];
            long live = to - k < STEP_K ? to - k : STEP_K;
            step_of_row(call->input + (row + r) * depth + k, live, quads, facts + (size_t)(k / STEP_K) * FACTS * rows * 4, rows, r);
            memcpy(tile + k * rows + r * STEP_K, quads, STEP_K);
        }
}

INLINE void to_bytes_as(int bits, const char *w, long steps, int ahead, char *out) {
    const size_t vector = vector_bytes(bits);
    for (long i = 0; i < 2 * steps; i++, w += vector) {
        char *to = out + (i / 2 * STEP_QUADS * 2 + i % 2) * QUAD_VECTOR;
        if (ahead)
            for (size_t b = 0; b < vector; b += 64) PREFETCH(w + b + AHEAD_G);
#define QUAD_TO_BYTES(j) I_STORE(to + 2 * (j) * QUAD_VECTOR, quad_at(bits, w, j));
        QUAD_TO_BYTES(0) QUAD_TO_BYTES(1) QUAD_TO_BYTES(2) QUAD_TO_BYTES(3)
        QUAD_TO_BYTES(4) QUAD_TO_BYTES(5) QUAD_TO_BYTES(6) QUAD_TO_BYTES(7)
#undef QUAD_TO_BYTES
    }
}

/* The numbers of a chunk's blocks, a byte each → out [steps][8 quads][PANEL_G][4]. */
static void to_bytes(int bits, const char *w, long steps, int ahead, char *out) {
    switch (bits) {
        case 4: to_bytes_as(4, w, steps, ahead, out); break;
        case 5: to_bytes_as(5, w, steps, ahead, out); break;
        case 6: to_bytes_as(6, w, steps, ahead, out); break;
        default: to_bytes_as(8, w, steps, ahead, out);
    }
}

/* One step of the chains of a tile of rows: CHAIN of grouped_products.h. half: 0 for a whole block, 1 and 2 for its halves. */
#define ROWS rows
#define SUMS(r, c) I_LOAD(sums + (r) * PANEL_G + (c) * WIDTH)
#define TOTAL(r, c) F_LOAD(TOTAL_AT(r, c))
#define SET_TOTAL(r, c, v) F_STORE(TOTAL_AT(r, c), v)
INLINE void chains_as(int zeros, int minima, const Piece *p, const char *facts, int rows, const int32_t *sums, long step, int half) {
    const char *of = facts + half * 2 * rows * 4;
    const long group = p->halves ? 2 * step + half / 2 : step >> p->shift;
    const Decoded *const decoded = p->decoded;
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < 2; c++) CHAIN(r, c, zeros, minima)
}
#undef ROWS
#undef SUMS
#undef TOTAL
#undef SET_TOTAL

static void chains(const Piece *p, const char *facts, int rows, const int32_t *sums, long step, int half) {
    if (p->zeros && p->minima) chains_as(1, 1, p, facts, rows, sums, step, half);
    else if (p->zeros) chains_as(1, 0, p, facts, rows, sums, step, half);
    else if (p->minima) chains_as(0, 1, p, facts, rows, sums, step, half);
    else chains_as(0, 0, p, facts, rows, sums, step, half);
}

#if QUAD_SUMS
#define TILE_ADD_NUMBERS(to, x, numbers) TILE_ADD_SU(to, x, numbers)
#else /* 128 is taken off numbers of 8 bits (OFFSET_OF), and others are below 64 */
#define TILE_ADD_NUMBERS(to, x, numbers) TILE_ADD_SS(to, x, numbers)
#endif

/* A chunk of a panel, as bytes, and of a tile of rows. */
static void matrix_chunk(const Piece *p, int rows, const char *numbers) {
    const char *x = p->x, *facts = p->facts;
    const long part = p->halves ? STEP_K / 2 : STEP_K; /* k's whose sums are scaled together */
    int32_t sums[TILE_ROWS * PANEL_G];
    for (long step = 0; step < p->steps; step++, x += STEP_K * rows, facts += FACTS * rows * 4)
        for (long k = 0; k < STEP_K; k += part, numbers += part * PANEL_G) {
            TILE_ZERO(0);
            TILE_LOAD(2, x + k, STEP_K);
            TILE_LOAD(3, numbers, PANEL_G * 4);
            TILE_ADD_NUMBERS(0, 2, 3);
            TILE_STORE(0, sums, PANEL_G * 4);
            if (TWO_G) {
                TILE_ZERO(1);
                TILE_LOAD(4, numbers + COLUMNS_G * 4, PANEL_G * 4);
                TILE_ADD_NUMBERS(1, 2, 4);
                TILE_STORE(1, sums + COLUMNS_G, PANEL_G * 4);
            }
            chains(p, facts, rows, sums, step, p->halves ? k ? 2 : 1 : 0);
        }
}

/* One panel for some tiles of rows, AT_ONCE at most. `shaped`: the rows that the unit's tiles have. */
static void matrix_panel_g(const Call *call, const Matrix *m, long first, long last, long panel, int ahead, int *shaped, float *all) {
    const Format *f = m->format;
    const long depth = call->depth;
    float totals[AT_ONCE][TILE_ROWS * PANEL_G];
    char numbers[CHUNK_K * PANEL_G];
    Decoded decoded;
    const char *w = m->weight + (size_t)panel * grouped_stride(f, depth);
    Piece p = piece_of_panel(f, &decoded, ahead);
    memset(totals, 0, sizeof totals);
    for (long k = 0; k < depth; k += CHUNK_K) {
        Chunk c = chunk_of(f, depth - k < CHUNK_K ? depth - k : CHUNK_K);
        p.steps = steps_of(depth - k < CHUNK_K ? depth - k : CHUNK_K);
        decode_chunk(f, &c, w, ahead, &decoded);
        to_bytes(f->bits, w + c.numbers, p.steps, ahead, numbers);
        for (long tile = first; tile < last; tile++) {
            int rows;
            const char *x = call->tiles + tile_at(call, tile, &rows) * grouped_row(depth);
            if (rows != *shaped) begin_shapes(*shaped = rows, p.halves ? STEP_K / 2 : STEP_K, 0, COLUMNS_G);
            p.x = x + k * rows, p.facts = x + ((size_t)steps_of(depth) * STEP_K + (size_t)(k / STEP_K) * FACTS * 4) * rows;
            p.totals = totals[tile - first];
            matrix_chunk(&p, rows, numbers);
        }
        w += c.bytes;
    }
    for (long tile = first; tile < last; tile++) {
        int rows;
        long row = tile_at(call, tile, &rows);
        finish8(rows, PANEL_G, totals[tile - first], m, all + row * m->columns, panel * PANEL_G);
    }
}

static void matrix_panels_g(const Call *call, const Matrix *m, float *all, long begin, long end) {
    long group = panels_at_once(call->rows, grouped_stride(m->format, call->depth)), tiles = tiles_of(call);
    int shaped = 0;
    for (long g = begin; g < end; g += group) {
        long stop = g + group < end ? g + group : end;
        for (long first = 0; first < tiles; first += AT_ONCE) {
            long last = first + AT_ONCE < tiles ? first + AT_ONCE : tiles;
            for (long p = g; p < stop; p++) matrix_panel_g(call, m, first, last, p, first == 0, &shaped, all);
        }
    }
    tiles_end();
}
#endif
