/* Attention over the block cache. */
#pragma once
#include "float_products.h"
#include "team.h"

/* ---- attention --------------------------------------------------------------------------------------------------------
 * One query row and one head: scores, softmax and sum in blocks of 16 keys, one block after the other from the first that
 * is seen (online softmax: Milakov and Gimelshein, 2018; Dao et al., 2022):
 *
 *   score = (chain over the key's dimensions) * scale, then soft-capped; m' = max(m, scores); c = exp(m - m')
 *   p = exp(score - m'); l = l * c + (p summed as a tree); y = chain over the block's keys, beginning at y * c
 *
 * A key that is not seen has p = 0, and a block without one that is seen changes nothing (c = 1): so rows that see more may
 * be computed beside it. Keys of a block lie transposed, [dimension][key]; values as they are, [key][dimension]. */

enum {
    KEYS = BLOCK_SIZE, /* in a block of the cache; given to the compiler (engine/scheduling/block_pool.py) */
    WIDEST = 256,   /* dimensions of a head */
    TILES = 16      /* tiles of rows that pass by a block of keys while it is in the cache */
};

_Static_assert(KEYS == 16, "attention is written for blocks of 16 keys: one vector with AVX-512, two of eight numbers elsewhere");

#if LANES == 16
#define VKEYS V1
#define STEP_VKEYS STEP_V1
#else
#define VKEYS V2
#define STEP_VKEYS STEP_V2
#endif

/* One sequence's chunk in a step. Layout shared with engine/compute/cpu/kernel_calls.py. */
typedef struct {
    long row, count, start; /* rows row … row + count - 1 are its tokens start … start + count - 1 */
    const int32_t *table;   /* its blocks */
    long first_item;        /* of work, see attend_items */
} Part;

/* Strides are in floats; the last dimension is dense. */
typedef struct {
    const float *query, *key, *value; /* [heads, rows, key_dim], [kv_heads, rows, key_dim], [kv_heads, rows, value_dim] */
    long query_head, query_row, key_head, key_row, value_head, value_row;
    float *out;            /* [rows, heads, value_dim] */
    float *keys, *values;  /* the cache: [kv_heads, slots, dim], a block's keys transposed */
    const int64_t *slots;  /* [rows]: where each row's key and value go */
    uint8_t *finite;       /* [rows]: set to 0 where a key or a value is not finite; what is stored is then 0 */
    const float *sinks;    /* [heads] or NULL */
    Part *parts;
    long rows, heads, kv_heads, key_dim, value_dim, cache_slots, count, items;
    long window, chunk;    /* tokens that are seen; the length of a chunk, whose tokens see no other chunk; 0: no such bound */
    float scale, softcap;
} Attention;

/* exp(x) for x <= 0, to about one unit in the last place; exactly 1 at 0 and exactly 0 below -87.3; NaN stays. Cephes' polynomial. */
INLINE vf exponential(vf x) {
    vf n = ROUND(MUL(x, SET(1.44269504088896341f)));
    vf r = FMA(n, SET(-0.693359375f), x);
    r = FMA(n, SET(2.12194440e-4f), r);
    vf p = FMA(SET(1.9875691500e-4f), r, SET(1.3981999507e-3f));
    p = FMA(p, r, SET(8.3334519073e-3f));
    p = FMA(p, r, SET(4.1665795894e-2f));
    p = FMA(p, r, SET(1.6666665459e-1f));
    p = FMA(p, r, SET(5.0000001201e-1f));
    p = FMA(MUL(p, r), r, r);
    p = ADD(p, SET(1.0f));
    return UNLESS_BELOW(x, -87.3f, MUL(p, POWER_OF_TWO(n)));
}

#define WORD_KEY(r, c) vf w##c = LOAD(k + (c) * LANES);
#define KEEP_SCORE_1(r, c) STORE(scores + (r) * KEYS + (c) * LANES, a##r##c);
#define KEEP_SCORE(r, V) V(KEEP_SCORE_1, r)
#define SUMMED_1(r, c) vf a##r##c = MUL(LOAD(y + (r) * stride + (c) * LANES), SET(keep[r]));
#define SUMMED(r, V) V(SUMMED_1, r)
#define WORD_VALUE(r, c) vf w##c = LOAD(v + (c) * LANES);
#define KEEP_SUM_1(r, c) STORE(y + (r) * stride + (c) * LANES, a##r##c);
#define KEEP_SUM(r, V) V(KEEP_SUM_1, r)

/* scores_R: q [dim][R] · k [dim][16] → scores [R][16], while `ahead` and what follows the keys are fetched.
 * sum_RV: y [R][V vectors] · keep + p [16][R] · v [16][dim]. */
#define ATTENTION_TILE(ROWS, R)                                                                                          \
    INLINE void scores_##ROWS(const float *x, const float *k, long dim, float *scores, const float *ahead) {             \
        R(DECLARE, VKEYS)                                                                                                \
        for (long d = 0; d < dim; d++, k += KEYS, x += ROWS) {                                                           \
            if (ahead) PREFETCH(ahead + d * KEYS), PREFETCH(k + KEYS * dim);                                             \
            VKEYS(WORD_KEY, 0) R(STEP, VKEYS)                                                                            \
        }                                                                                                                \
        R(KEEP_SCORE, VKEYS)                                                                                             \
    }                                                                                                                    \
    INLINE void sum2_##ROWS(const float *x, const float *v, long dim, const float *keep, float *y, long stride) {        \
        R(SUMMED, V2)                                                                                                    \
        for (int j = 0; j < KEYS; j++, v += dim, x += ROWS) { V2(WORD_VALUE, 0) R(STEP, V2) }                            \
        R(KEEP_SUM, V2)                                                                                                  \
    }                                                                                                                    \
    INLINE void sum1_##ROWS(const float *x, const float *v, long dim, const float *keep, float *y, long stride) {        \
        R(SUMMED, V1)                                                                                                    \
        for (int j = 0; j < KEYS; j++, v += dim, x += ROWS) { V1(WORD_VALUE, 0) R(STEP, V1) }                            \
        R(KEEP_SUM, V1)                                                                                                  \
    }                                                                                                                    \
    INLINE void sums_##ROWS(const float *p, const float *v, long dim, const float *keep, float *y) {                     \
        long n = 0;                                                                                                      \
        for (; n + 2 * LANES <= dim; n += 2 * LANES) sum2_##ROWS(p, v + n, dim, keep, y + n, dim);                       \
        if (n < dim) sum1_##ROWS(p, v + n, dim, keep, y + n, dim);                                                       \
    }
ATTENTION_TILE(1, R1) ATTENTION_TILE(2, R2) ATTENTION_TILE(3, R3)
ATTENTION_TILE(4, R4) ATTENTION_TILE(5, R5) ATTENTION_TILE(6, R6)

/* The state of a tile's rows while it goes through the keys. */
typedef struct {
    int rows;
    long position[TALLEST];
    float most[TALLEST], total[TALLEST];
    float *query; /* [key_dim][rows] */
    float *sum;   /* [rows][value_dim] */
} Tile;

INLINE void soft_cap(float *scores, float cap) {
    for (int i = 0; i < KEYS; i += LANES) {
        /* tanh(z) = sign(z) (1 - e) / (1 + e), e = exp(-2 |z|) */
        float z[LANES], e[LANES];
        for (int j = 0; j < LANES; j++) {
            z[j] = scores[i + j] / cap;
            e[j] = z[j] < 0 ? 2 * z[j] : -2 * z[j];
        }
        STORE(e, exponential(LOAD(e)));
        for (int j = 0; j < LANES; j++) {
            float t = (1 - e[j]) / (1 + e[j]);
            scores[i + j] = cap * (z[j] < 0 ? -t : t);
        }
    }
}

/* The first token that the one at `position` sees. */
INLINE long first_seen(const Attention *a, long position) {
    long first = a->window && position >= a->window ? position - a->window + 1 : 0;
    long chunk = a->chunk ? position - position % a->chunk : 0;
    return chunk > first ? chunk : first;
}

/* One block of 16 keys, the first of which is token `first`, and one tile. fetch: whether nobody has read the block yet. Its
 * values are then fetched while its keys are read, and with them the keys behind, mostly the next block's: values are read
 * in strips of columns, which no processor's own prefetching follows. */
static void attend_block(const Attention *a, Tile *t, const float *k, const float *v, long first, int fetch) {
    const float *ahead = fetch ? v : NULL;
    float scores[TALLEST * KEYS], p[KEYS * TALLEST], keep[TALLEST];
    switch (t->rows) {
        case 1: scores_1(t->query, k, a->key_dim, scores, ahead); break;
        case 2: scores_2(t->query, k, a->key_dim, scores, ahead); break;
        case 3: scores_3(t->query, k, a->key_dim, scores, ahead); break;
        case 4: scores_4(t->query, k, a->key_dim, scores, ahead); break;
        case 5: scores_5(t->query, k, a->key_dim, scores, ahead); break;
        default: scores_6(t->query, k, a->key_dim, scores, ahead);
    }
    for (int r = 0; r < t->rows; r++) {
        float *s = scores + r * KEYS, most = t->most[r];
        for (int i = 0; i < KEYS; i += LANES) STORE(s + i, MUL(LOAD(s + i), SET(a->scale)));
        if (a->softcap > 0) soft_cap(s, a->softcap);
        long seen = t->position[r] - first; /* the last key of the block that is */
        long hidden = first_seen(a, t->position[r]) - 1 - first; /* the last that is too long ago */
        if (seen < KEYS - 1 || hidden >= 0)
            for (long j = 0; j < KEYS; j++)
                if (j > seen || j <= hidden) s[j] = -__builtin_inff();
        most = largest_of(s, most);
        float change[LANES];
        STORE(change, exponential(SET(t->most[r] - most)));
        keep[r] = change[0];
        for (int i = 0; i < KEYS; i += LANES)
            STORE(s + i, exponential(SUB(LOAD(s + i), SET(most))));
        t->total[r] = __builtin_fmaf(t->total[r], keep[r], tree(s));
        t->most[r] = most;
        for (int j = 0; j < KEYS; j++) p[j * t->rows + r] = s[j];
    }
    switch (t->rows) {
        case 1: sums_1(p, v, a->value_dim, keep, t->sum); break;
        case 2: sums_2(p, v, a->value_dim, keep, t->sum); break;
        case 3: sums_3(p, v, a->value_dim, keep, t->sum); break;
        case 4: sums_4(p, v, a->value_dim, keep, t->sum); break;
        case 5: sums_5(p, v, a->value_dim, keep, t->sum); break;
        default: sums_6(p, v, a->value_dim, keep, t->sum);
    }
}

/* Up to TILES tiles of one sequence and one key head. Its query rows are those of all heads that share these keys, token by
 * token; this is the work item `item` of them. */
static void attend(const Attention *a, const Part *part, long kv_head, long item) {
    float query[TILES * TALLEST * WIDEST], sum[TILES * TALLEST * WIDEST];
    Tile tiles[TILES];
    long share = a->heads / a->kv_heads, all = part->count * share, from = item * TILES * TALLEST;
    long to = from + TILES * TALLEST < all ? from + TILES * TALLEST : all;
    int count = 0;
    for (long row = from; row < to; count++) {
        Tile *t = tiles + count;
        t->rows = height(TALLEST, to - row);
        t->query = query + (row - from) * a->key_dim;
        t->sum = sum + (row - from) * a->value_dim;
        memset(t->sum, 0, sizeof(float) * (size_t)(t->rows * a->value_dim));
        for (int r = 0; r < t->rows; r++, row++) {
            long token = row / share, head = kv_head * share + row % share;
            t->position[r] = part->start + token;
            t->most[r] = a->sinks ? a->sinks[head] : -1.0e30f;
            t->total[r] = a->sinks ? 1.0f : 0.0f;
            const float *q = a->query + head * a->query_head + (part->row + token) * a->query_row;
            for (long d = 0; d < a->key_dim; d++) t->query[d * t->rows + r] = q[d];
        }
    }
    const float *keys = a->keys + kv_head * a->cache_slots * a->key_dim;
    const float *values = a->values + kv_head * a->cache_slots * a->value_dim;
    long last = tiles[count - 1].position[tiles[count - 1].rows - 1] / KEYS;
    long first = first_seen(a, tiles[0].position[0]) / KEYS;
    for (long block = first; block <= last; block++) {
        long slot = (long)part->table[block] * KEYS;
        int fetched = 0;
        for (int i = 0; i < count; i++) {
            Tile *t = tiles + i;
            if (t->position[t->rows - 1] < block * KEYS) continue;
            if (first_seen(a, t->position[0]) >= (block + 1) * KEYS) continue;
            attend_block(a, t, keys + slot * a->key_dim, values + slot * a->value_dim, block * KEYS, !fetched);
            fetched = 1;
        }
    }
    for (int i = 0; i < count; i++)
        for (int r = 0; r < tiles[i].rows; r++) {
            const Tile *t = tiles + i;
            long token = t->position[r] - part->start, row = from;
            for (int before = 0; before < i; before++) row += tiles[before].rows;
            long head = kv_head * share + (row + r) % share;
            float *out = a->out + ((part->row + token) * a->heads + head) * a->value_dim;
            for (long d = 0; d < a->value_dim; d++) out[d] = t->sum[r * a->value_dim + d] / t->total[r];
        }
}

/* 0, or NaN if a number is not finite. */
INLINE vf strange(const float *x, long count) {
    vf odd = ZERO();
    long i = 0;
    for (; i + LANES <= count; i += LANES) odd = ADD(odd, SUB(LOAD(x + i), LOAD(x + i)));
    for (; i < count; i++) odd = ADD(odd, SET(x[i] - x[i]));
    return odd;
}

/* Store the keys and values of one row; if any head's are not finite, zeros for all. */
static void store(const Attention *a, long row) {
    long block = a->slots[row] / KEYS, offset = a->slots[row] % KEYS;
    vf odd = ZERO();
    for (long h = 0; h < a->kv_heads; h++) {
        odd = ADD(odd, strange(a->key + h * a->key_head + row * a->key_row, a->key_dim));
        odd = ADD(odd, strange(a->value + h * a->value_head + row * a->value_row, a->value_dim));
    }
    float lanes[LANES];
    STORE(lanes, odd);
    int good = 1;
    for (int i = 0; i < LANES; i++) good &= lanes[i] == 0;
    if (!good) a->finite[row] = 0;
    for (long h = 0; h < a->kv_heads; h++) {
        const float *k = a->key + h * a->key_head + row * a->key_row, *v = a->value + h * a->value_head + row * a->value_row;
        float *keys = a->keys + (h * a->cache_slots + block * KEYS) * a->key_dim + offset;
        float *values = a->values + (h * a->cache_slots + a->slots[row]) * a->value_dim;
        for (long d = 0; d < a->key_dim; d++) keys[d * KEYS] = good ? k[d] : 0;
        for (long d = 0; d < a->value_dim; d++) values[d] = good ? v[d] : 0;
    }
}

static void store_rows(void *attention, long begin, long end) {
    for (long row = begin; row < end; row++) store(attention, row);
}

/* Cuts the work in items. Sets each part's first_item. */
static void cut_attention(Attention *a) {
    a->items = 0;
    for (long i = 0; i < a->count; i++) {
        a->parts[i].first_item = a->items;
        long all = a->parts[i].count * (a->heads / a->kv_heads);
        a->items += (all + TILES * TALLEST - 1) / (TILES * TALLEST) * a->kv_heads;
    }
}

/* Items cost different amounts (later rows see more keys): the last rows first. */
static void attend_items(void *attention, long begin, long end) {
    const Attention *a = attention;
    for (long i = begin; i < end; i++) {
        long item = a->items - 1 - i, part = 0;
        while (part + 1 < a->count && a->parts[part + 1].first_item <= item) part++;
        item -= a->parts[part].first_item;
        attend(a, a->parts + part, item % a->kv_heads, item / a->kv_heads);
    }
}
