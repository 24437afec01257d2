/* A decoder layer of the functions beside this file. */
#pragma once
#include "attention.h"
#include "products.h"
#include "rows.h"

/* x + o(attention(rotary(norm(q(n))), rotary(norm(k(n))), v(n))), n = norm(x); then that + down(silu(gate(m)) * up(m)),
 * m = norm of it. All in one call of the team. With one row, only the products and attention are divided. */

/* Layout shared with engine/compute/cpu/kernel_calls.py. */
typedef struct {
    const float *first_norm, *second_norm;     /* [dim] */
    const float *query_norm, *key_norm;        /* [key_dim], or NULL */
    const Matrix *qkv, *o, *gate_up, *down;    /* 3, 1, 2 and 1 */
    const float *sinks;                        /* [heads] or NULL */
    long dim, inner, heads, kv_heads, key_dim, value_dim, rotary, window, chunk;
    float first_epsilon, second_epsilon, query_epsilon, key_epsilon, scale, softcap;
} Layer;

typedef struct {
    const Layer *layer;
    const float *x, *cos, *sin; /* [rows, dim], [rows, rotary] */
    float *out;                 /* [rows, dim] */
    float *normed, *query, *key, *value, *attended, *gate, *up;
    long rows;
    Attention attention; /* of the first rows; the others are padding, and attend to nothing */
    Call qkv, o, gate_up, down;
} LayerCall;

/* Norm and rotary embedding of head `h` of a row of `heads`. */
INLINE void rotate_head(float *x, long row, long heads, long h, long dim, const float *norm, float epsilon, const float *cos,
                        const float *sin, long rotary) {
    x += (row * heads + h) * dim;
    if (norm) norm_row(x, norm, x, dim, epsilon);
    rotate(x, cos + row * rotary, sin + row * rotary, rotary);
}

/* Norm a tile's rows, and lay them out for the product after it. */
static void norm_tiles(const Call *call, const float *x, const float *weight, float *out, float epsilon, long begin, long end) {
    for (long tile = begin; tile < end; tile++) {
        long first = tile_start(call->rows, tile), dim = call->depth;
        int rows = height(call->rows - first);
        for (long row = first; row < first + rows; row++) norm_row(x + row * dim, weight, out + row * dim, dim, epsilon);
        lay_out(call, first, rows, 0, dim);
    }
}

static void first_norm(void *data, long begin, long end) {
    const LayerCall *c = data;
    norm_tiles(&c->qkv, c->x, c->layer->first_norm, c->normed, c->layer->first_epsilon, begin, end);
}

static void second_norm(void *data, long begin, long end) {
    const LayerCall *c = data;
    norm_tiles(&c->gate_up, c->out, c->layer->second_norm, c->normed, c->layer->second_epsilon, begin, end);
}

/* Rows' queries and keys, normed and rotated; keys and values to the cache. Padding attends to nothing. */
static void rotate_rows(void *data, long begin, long end) {
    const LayerCall *c = data;
    const Layer *l = c->layer;
    long of_row = l->heads * l->value_dim;
    for (long row = begin; row < end; row++) {
        if (row >= c->attention.rows) {
            memset(c->attended + row * of_row, 0, sizeof(float) * (size_t)of_row);
            continue;
        }
        for (long h = 0; h < l->heads; h++)
            rotate_head(c->query, row, l->heads, h, l->key_dim, l->query_norm, l->query_epsilon, c->cos, c->sin, l->rotary);
        for (long h = 0; h < l->kv_heads; h++)
            rotate_head(c->key, row, l->kv_heads, h, l->key_dim, l->key_norm, l->key_epsilon, c->cos, c->sin, l->rotary);
        store(&c->attention, row);
    }
}

/* silu(gate) * up, laid out for the product after it. */
static void activate_pieces(void *data, long begin, long end) {
    const LayerCall *c = data;
    long inner = c->layer->inner;
    for (long unit = begin; unit < end; unit++) {
        long first, from, to;
        int rows;
        piece_of(&c->down, unit, &first, &rows, &from, &to);
        for (long row = first; row < first + rows; row++)
            silu_range(c->gate, c->up, c->gate, row * inner + from, row * inner + to);
        lay_out(&c->down, first, rows, from, to);
    }
}

static void run_layer(LayerCall *c, int threads) {
    long tiles = tiles_of(c->rows), pieces = tiles * pieces_of(&c->down);
    long few = c->rows < TALLEST / 2 ? TALLEST / 2 : 1; /* pieces that are not worth sharing */
    const Phase phases[] = {
        {first_norm, c, tiles, 1},
        multiplying(&c->qkv),
        {rotate_rows, c, c->rows, 1},
        {attend_items, &c->attention, c->attention.items, 1},
        laying_out(&c->o),
        multiplying(&c->o), /* to `normed`; with x, to `out` */
        {second_norm, c, tiles, 1},
        multiplying(&c->gate_up),
        {activate_pieces, c, pieces, few},
        multiplying(&c->down), /* to `normed`; added to `out` */
    };
    team_run(phases, sizeof phases / sizeof *phases, threads);
}

/* Floats for a row between a layer's two norms, at most. */
INLINE long between(const Layer *l) {
    return larger(l->heads * (l->key_dim + l->value_dim) + l->kv_heads * (l->key_dim + l->value_dim), 2 * l->inner);
}
