/* A decoder layer of the functions beside this file. */
#pragma once
#include "attention.h"
#include "products.h"
#include "rows.h"

/*   n = input_norm(x)
 *   y = x + factor · attention_norm(o(attention(rotary(query_norm(q(n))), rotary(key_norm(k(n))), v(n))))
 *   m = mlp_norm(y), or n itself if the layer is parallel
 *   y + factor · output_norm(down(activation(gate(m)) * up(m)))
 *
 * Any norm may be missing, and all that comes after y. All in one call of the team. With one row, only the products and
 * attention are divided. */

/* Layout shared with engine/compute/cpu/kernel_calls.py. */
typedef struct {
    Norm input_norm, attention_norm, mlp_norm, output_norm; /* [dim] */
    Norm query_norm, key_norm;                              /* of each head, [key_dim]; or of all, if `whole` */
    const Matrix *qkv, *o, *gate_up, *down;                 /* 3 or 1, 1, 2 or 1, and 1; without `gate_up` y is the result */
    const float *sinks;                                     /* [heads] or NULL */
    long dim, inner, heads, kv_heads, key_dim, value_dim, rotary, window, chunk;
    int qkv_count, gate_up_count;
    int pairing, activation, whole, parallel;
    float scale, softcap, factor;
} Layer;

typedef struct {
    const Layer *layer;
    const float *x, *cos, *sin; /* [rows, dim], [rows, angles] */
    float *out;                 /* [rows, dim] */
    float *normed;              /* [rows, dim]: input of qkv, or of gate and up */
    float *product;             /* [rows, dim]: of o and of down; may be `normed` */
    float *query, *key, *value, *gate, *up; /* their rows lie as far apart as these say: */
    long query_row, key_row, value_row, gate_row;
    float *attended; /* [rows, heads, value_dim] */
    float *active;   /* [rows, inner]; may be `gate` */
    long rows;
    Attention attention; /* of the first rows; the others are padding, and attend to nothing */
    Call qkv, o, gate_up, down;
} LayerCall;

/* Whether what follows a product has to wait for whole rows of it: else the product adds x itself. */
INLINE int waits(const Layer *l, const Norm *norm) { return norm->weight || l->factor != 1.0f; }

/* out = x + factor · norm(product), for one row. */
static void join_row(const LayerCall *c, const float *x, const Norm *norm, long row) {
    long dim = c->layer->dim;
    float *y = c->product + row * dim, *out = c->out + row * dim, factor = c->layer->factor;
    if (norm->weight) norm_row(y, norm, y, dim);
    for (long i = 0; i < dim; i++) out[i] = x[row * dim + i] + y[i] * factor;
}

/* A tile's rows, normed and laid out for q, k and v. */
static void before_attention(void *data, long begin, long end) {
    const LayerCall *c = data;
    const Layer *l = c->layer;
    for (long tile = begin; tile < end; tile++) {
        int rows;
        long first = tile_at(&c->qkv, tile, &rows);
        for (long row = first; l->input_norm.weight && row < first + rows; row++)
            norm_row(c->x + row * l->dim, &l->input_norm, c->normed + row * l->dim, l->dim);
        lay_out(&c->qkv, first, rows, 0, l->dim);
    }
}

/* The product whose tiles `after_attention` takes: the next one, if there is one. */
INLINE const Call *next_product(const LayerCall *c) { return c->layer->gate_up ? &c->gate_up : &c->o; }

/* A tile's rows, added to x, normed and laid out for gate and up. */
static void after_attention(void *data, long begin, long end) {
    const LayerCall *c = data;
    const Layer *l = c->layer;
    for (long tile = begin; tile < end; tile++) {
        int rows;
        long first = tile_at(next_product(c), tile, &rows);
        for (long row = first; row < first + rows; row++) {
            if (waits(l, &l->attention_norm)) join_row(c, c->x, &l->attention_norm, row);
            if (l->mlp_norm.weight) norm_row(c->out + row * l->dim, &l->mlp_norm, c->normed + row * l->dim, l->dim);
        }
        if (l->gate_up) lay_out(&c->gate_up, first, rows, 0, l->dim);
    }
}

static void after_mlp(void *data, long begin, long end) {
    const LayerCall *c = data;
    for (long row = begin; row < end; row++) join_row(c, c->out, &c->layer->output_norm, row);
}

/* Norm and rotary embedding of a row's heads. */
static void rotate_heads(const LayerCall *c, float *x, long heads, const Norm *norm, long row) {
    const Layer *l = c->layer;
    long at = row * angles(l->rotary, l->pairing);
    if (norm->weight && l->whole) norm_row(x, norm, x, heads * l->key_dim);
    for (long h = 0; h < heads; h++, x += l->key_dim) {
        if (norm->weight && !l->whole) norm_row(x, norm, x, l->key_dim);
        rotate(x, c->cos + at, c->sin + at, l->rotary, l->pairing);
    }
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
        rotate_heads(c, c->query + row * c->query_row, l->heads, &l->query_norm, row);
        rotate_heads(c, c->key + row * c->key_row, l->kv_heads, &l->key_norm, row);
        store(&c->attention, row);
    }
}

/* activation(gate) * up, laid out for the product after it. */
static void activate_pieces(void *data, long begin, long end) {
    const LayerCall *c = data;
    long inner = c->layer->inner;
    for (long unit = begin; unit < end; unit++) {
        long first, from, to;
        int rows;
        piece_of(&c->down, unit, &first, &rows, &from, &to);
        for (long row = first; row < first + rows; row++) {
            long at = row * c->gate_row + from;
            activate(c->layer->activation, c->gate + at, c->up + at, c->active + row * inner + from, to - from);
        }
        lay_out(&c->down, first, rows, from, to);
    }
}

static void run_layer(LayerCall *c, int threads) {
    const Layer *l = c->layer;
    long pieces = l->gate_up ? tiles_of(&c->down) * pieces_of(&c->down) : 0;
    long few = c->rows < TALLEST / 2 ? TALLEST / 2 : 1; /* pieces that are not worth sharing */
    const Phase phases[] = {
        {before_attention, c, tiles_of(&c->qkv), 1},
        multiplying(&c->qkv),
        {rotate_rows, c, c->rows, 1},
        {attend_items, &c->attention, c->attention.items, 1},
        laying_out(&c->o),
        multiplying(&c->o), /* to `product`; with x, to `out` */
        {after_attention, c, l->gate_up || waits(l, &l->attention_norm) ? tiles_of(next_product(c)) : 0, 1},
        multiplying(&c->gate_up),
        {activate_pieces, c, pieces, few},
        multiplying(&c->down), /* to `product`; added to `out` */
        {after_mlp, c, l->gate_up && waits(l, &l->output_norm) ? c->rows : 0, 1},
    };
    team_run(phases, sizeof phases / sizeof *phases, threads);
}

/* Floats of a row for q, k, v and attention, or for gate, up and what is made of them. */
INLINE long between(const Layer *l) {
    long heads = l->heads * (l->key_dim + l->value_dim) + l->kv_heads * (l->key_dim + l->value_dim);
    return larger(heads, (l->gate_up_count == 1 ? 3 : 2) * l->inner);
}

/* Floats of a row for what is normed, and for a product if that is still needed then. */
INLINE long beside(const Layer *l) { return l->parallel ? 2 * l->dim : l->dim; }

/* scratch: rows * (beside + between) floats, then what the largest product lays out. */
static void start_layer(LayerCall *c, float *scratch) {
    const Layer *l = c->layer;
    long queries = l->heads * l->key_dim, keys = l->kv_heads * l->key_dim, values = l->kv_heads * l->value_dim;
    int one = l->qkv_count == 1, both = l->gate_up_count == 1;
    c->normed = scratch, c->product = l->parallel ? scratch + c->rows * l->dim : scratch;
    float *middle = scratch + c->rows * beside(l), *rest = middle + c->rows * between(l);
    c->query = middle;
    c->query_row = one ? queries + keys + values : queries;
    c->key_row = one ? c->query_row : keys, c->value_row = one ? c->query_row : values;
    c->key = c->query + (one ? queries : c->rows * queries);
    c->value = c->key + (one ? keys : c->rows * keys);
    c->attended = middle + c->rows * (queries + keys + values);
    c->gate = middle, c->gate_row = both ? 2 * l->inner : l->inner;
    c->up = c->gate + (both ? l->inner : c->rows * l->inner);
    c->active = both ? c->gate + c->rows * 2 * l->inner : c->gate;
    const float *qkv = l->input_norm.weight ? c->normed : c->x;
    const float *gate_up = l->mlp_norm.weight ? c->normed : l->parallel ? qkv : c->out;
    c->qkv = call_of(qkv, rest, c->query, l->qkv, c->rows, l->dim, l->qkv_count);
    c->o = call_of(c->attended, rest, c->product, l->o, c->rows, l->heads * l->value_dim, 1);
    if (!waits(l, &l->attention_norm)) c->o.residual = c->x, c->o.sum = c->out;
    if (!l->gate_up) return;
    c->gate_up = call_of(gate_up, rest, c->gate, l->gate_up, c->rows, l->dim, l->gate_up_count);
    c->down = call_of(c->active, rest, c->product, l->down, c->rows, l->inner, 1);
    if (!waits(l, &l->output_norm)) c->down.residual = c->out, c->down.sum = c->out;
}
