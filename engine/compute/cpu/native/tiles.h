/* How a product is cut: panels of columns, tiles of rows, chains of k. Knows sizes; computes nothing. */
#pragma once
#include "vectors.h"

enum {
    FLOAT32 = 0,
    BFLOAT16 = 1,
    INT8 = 2,
    GROUPED = 3,
    PANEL = 2 * LANES, /* columns of the result that are stored together */
    BLOCK = 1024,      /* k's in a chain */
    GROUP = 128,       /* k's that share a scale (int8) */
    TALLEST = 6,       /* rows of a tile: 6 by 2 vectors of sums leave 4 of 16 registers */
    MATRIX_ROWS = 16,  /* rows of a tile of a matrix unit (matrix_tiles.h) */
    /* Rows from which that unit is used. A tile costs about the same however few rows it has, and tiles are what threads share while
     * an input is laid out: of fewer rows than these there would be one. To be measured where there is such a unit. */
    MATRIX_FROM = 2 * MATRIX_ROWS,
    CACHED = 256 << 10, /* bytes of weights that stay in a core's second-level cache while all rows pass by */
    WORTH = 32 << 10,  /* bytes of weights that are worth taking by themselves, for one row */
    DEEP = 8 * GROUP   /* k's of a tile that are laid out at once */
};

/* How whole numbers in groups are stored (engine.compute.whole.groups.Groups): the kind of each part is one of grouped_layout.h.
 * Layout shared with engine/compute/cpu/kernel_calls.py. */
typedef struct {
    int bits, group, per, zero; /* 4, 5, 6, 8; 16, 32, 64, 128; groups of a super-group; one for all, if `zeros` is NONE */
    int scales, supers, minima, minimum_supers, zeros;
} Format;

/* One matrix of a call. Layout shared with engine/compute/cpu/kernel_calls.py. */
typedef struct {
    const char *weight; /* packed */
    const float *bias;  /* [columns] or NULL */
    long columns;
    const Format *format; /* if the kind is GROUPED */
    int kind;
} Matrix;

typedef struct {
    const float *input; /* [rows, depth] */
    char *tiles;        /* the same, tile by tile: [depth][rows of the tile] */
    float *out;         /* one [rows, columns] after the other */
    const Matrix *matrices;
    long rows, depth, count, panels;
    int kind;    /* of the input: FLOAT32, INT8 or GROUPED */
    int tallest; /* rows of a tile at most: MATRIX_ROWS if a matrix unit multiplies, else TALLEST */
    const float *residual; /* [rows, columns] or NULL: then sum = residual + out, for a single matrix */
    float *sum;
} Call;

INLINE long larger(long a, long b) { return a > b ? a : b; }

/* Rows of the first of the tiles that `rows` rows are cut into: 7 rows are 4 and 3, not 6 and 1. */
INLINE int height(int tallest, long rows) {
    return rows <= tallest ? (int)rows : rows < 2 * tallest ? (int)((rows + 1) / 2) : tallest;
}

/* How many tiles that makes of all rows of a call; where the one with number `tile` begins, and how many rows it has. */
INLINE long whole_tiles(const Call *c) { return c->rows < 2 * c->tallest ? 0 : c->rows / c->tallest - 1; }
INLINE long tiles_of(const Call *c) {
    return whole_tiles(c) + 1 + (c->rows - whole_tiles(c) * c->tallest > c->tallest);
}
INLINE long tile_at(const Call *c, long tile, int *rows) {
    long whole = whole_tiles(c), row = (tile < whole ? tile : whole) * c->tallest;
    if (tile > whole) row += height(c->tallest, c->rows - row);
    *rows = height(c->tallest, c->rows - row);
    return row;
}

/* A tile's sums are named variables, which every compiler keeps in registers: V1 … V8 name the vectors of a row,
 * R1 … R6 the rows. */
#define V1(Y, r) Y(r, 0)
#define V2(Y, r) V1(Y, r) Y(r, 1)
#define V4(Y, r) V2(Y, r) Y(r, 2) Y(r, 3)
#define V8(Y, r) V4(Y, r) Y(r, 4) Y(r, 5) Y(r, 6) Y(r, 7)
#define R1(X, V) X(0, V)
#define R2(X, V) R1(X, V) X(1, V)
#define R3(X, V) R2(X, V) X(2, V)
#define R4(X, V) R3(X, V) X(3, V)
#define R5(X, V) R4(X, V) X(4, V)
#define R6(X, V) R5(X, V) X(5, V)
