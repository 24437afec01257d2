/* Compute a model's layers on a CPU: products, attention, norms, activations, and a whole decoder layer of these. Compiled
 * for the machine that runs it by engine/compute/cpu/kernels.py. Knows arrays; nothing of tensors or models.
 *
 * The promise, for every function here: a row of the result depends on that row of the input alone, not on how many rows
 * are computed with it, nor on the number of threads, nor on the width of the processor's vectors. It is kept by giving
 * every single number of the result its own chain of operations, in a fixed order, each rounded as IEEE 754 says:
 *
 *   linear, float32    y = (chain over k = 0 … 1023) + (chain over the next 1024) + … + bias
 *                      chain: s = fma(x[k], w[k], s), beginning at 0
 *   linear, int8       y = chain over groups g of 128: s = fma(float(sum of products of bytes), x_scale[g] * w_scale[g], s)
 *   linear, grouped    y = chain over each 32 k's: as int8, with zeros and minima: see grouped_products.h
 *   attention, norm    see there
 *   layer, experts     the functions here, one after the other: the bits of each called by itself; experts' sums: see there
 *
 * Vectors run over the columns of the result, never along k: there is nothing to reduce at the end, and wider vectors give
 * the same bits. (oneDNN's packed float32 product has the same chain on AVX2, and so the same bits: a test compares them.)
 *
 * Weights are stored in panels of neighbouring columns, k by k, so that a thread reads them as one stream. A weight that
 * bfloat16 holds without loss is stored as such and widened in a register: the same bits at half the memory traffic.
 */
#define _GNU_SOURCE /* pthread_setname_np */
#include "experts.h"
#include "layers.h"
#include "packing.h"
#include "rounding.h"
#include "widening.h"

/* Bytes of `linear`'s scratch space for a row. */
long verbatim_scratch(long depth, int kind) { return row_bytes(kind, depth); }

/* Products of one input with several matrices, all of the same depth, whose kinds take the same input (`input_of`).
 * input [rows, depth]; scratch: rows · verbatim_scratch bytes; out: one [rows, columns] after the other. */
void verbatim_linear(const float *input, void *scratch, float *out, const Matrix *matrices, long rows, long depth, long count,
                     int threads) {
    Call call = call_of(input, scratch, out, matrices, rows, depth, count);
    team_run((Phase[]){laying_out(&call), multiplying(&call)}, 2, threads);
}

/* Bytes of a packed matrix. `format` is NULL if the kind is not GROUPED. */
long verbatim_packed_bytes(long columns, long depth, int kind, const Format *format) {
    return panels_of(columns, kind) * (long)stride_of(kind, format, depth);
}

/* weight [columns, depth] → packed. Returns 1 if bfloat16 was asked for and would lose something (`out` is then useless). */
int verbatim_pack(const float *weight, void *out, long columns, long depth, int kind, int threads) {
    Packing p = {weight, out, columns, depth, kind, 0};
    team_run(&(Phase){pack_panels, &p, panels_of(columns, kind), 1}, 1, threads);
    return p.lossy;
}

/* Whole numbers in groups → packed. Returns 1 if a number has more than `bits` bits (`out` is then useless). */
int verbatim_pack_groups(const Format *format, const GroupParts *parts, void *out, long columns, long depth, int threads) {
    GroupPacking p = {*format, *parts, out, columns, depth, 0};
    team_run(&(Phase){pack_group_panels, &p, panels_of(columns, GROUPED), 1}, 1, threads);
    return p.too_large;
}

/* weight [columns, depth] → whole numbers of 4 or 6 bits in groups of 32. Returns 1 if a number is not finite (nothing of
 * the result is of use then). scales … minimum_supers: see `Rounding`. */
int verbatim_round(const float *weight, void *numbers, void *scales, void *minima, void *supers, void *minimum_supers,
                   long columns, long depth, int bits, int threads) {
    Rounding r = {weight, numbers, scales, minima, supers, minimum_supers, columns, depth, bits, 0};
    team_run(&(Phase){round_rows, &r, columns, 4096 / depth + 1}, 1, threads);
    return r.infinite;
}

/* What `count` columns of a packed matrix stand for → out [count, depth]; columns NULL: the first ones. */
void verbatim_widen(const Matrix *matrix, const int64_t *columns, float *out, long depth, long count, int threads) {
    Widening w = {matrix, columns, out, depth};
    team_run(&(Phase){widen_columns, &w, count, 4096 / depth + 1}, 1, threads);
}

/* Whether products of many rows use the processor's matrix unit: not until this is called with 1, by a process that knows the unit
 * to work. Returns 0; ENOSYS if the kernels have nothing for it; or why the system refuses it. The bits are the same. */
int verbatim_matrix_unit(int use) {
#if MATRIX_UNIT
    int refused = use ? ask_for_tiles() : 0;
    atomic_store(&matrix_unit, use && !refused);
    return refused;
#else
    (void)use;
    return ENOSYS;
#endif
}

/* What the kernels were compiled for. */
const char *verbatim_target(void) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    return "NEON, dot products, I8MM";
#elif defined(__ARM_FEATURE_DOTPROD)
    return "NEON, dot products";
#elif defined(__aarch64__)
    return "NEON";
#elif defined(__AVX512F__)
    return VNNI ? "AVX-512, VNNI" : "AVX-512";
#else
    return VNNI ? "AVX2, VNNI" : "AVX2";
#endif
}

/* Store a step's keys and values, then attend. Sets each part's first_item. */
void verbatim_attention(const float *query, const float *key, const float *value, long query_head, long query_row,
                        long key_head, long key_row, long value_head, long value_row, float *out, float *keys, float *values,
                        const int64_t *slots, uint8_t *finite, const float *sinks, Part *parts, long rows, long heads,
                        long kv_heads, long key_dim, long value_dim, long cache_slots, long count, long window, long chunk,
                        float scale, float softcap, int threads) {
    Attention a = {query, key, value, query_head, query_row, key_head, key_row, value_head, value_row, out, keys, values,
                   slots, finite, sinks, parts, rows, heads, kv_heads, key_dim, value_dim, cache_slots, count, 0, window,
                   chunk, scale, softcap};
    cut_attention(&a);
    team_run((Phase[]){{store_rows, &a, rows, 4}, {attend_items, &a, a.items, 1}}, 2, threads);
}

typedef struct {
    const float *x;
    Norm norm;
    float *out;
    long rows, dim;
} NormCall;

static void norm_rows(void *norm, long begin, long end) {
    const NormCall *n = norm;
    for (long row = begin; row < end; row++) norm_row(n->x + row * n->dim, &n->norm, n->out + row * n->dim, n->dim);
}

/* norm_row for every row. x and out [rows, dim], weight [dim]. */
void verbatim_norm(const float *x, const float *weight, float *out, long rows, long dim, float epsilon, int centred,
                   int threads) {
    NormCall n = {x, {weight, epsilon, centred}, out, rows, dim};
    team_run(&(Phase){norm_rows, &n, rows, (1 << 14) / dim + 1}, 1, threads);
}

typedef struct {
    const float *x;
    float *out;
    long size;
    int kind;
} Activation;

enum { ACTIVATED = 4096 }; /* numbers of a unit */

static void activate_units(void *data, long begin, long end) {
    const Activation *a = data;
    long from = begin * ACTIVATED, to = end * ACTIVATED < a->size ? end * ACTIVATED : a->size;
    activate(a->kind, a->x + from, NULL, a->out + from, to - from);
}

/* out = the activation `kind` of x, both [size]. */
void verbatim_activate(const float *x, float *out, long size, int kind, int threads) {
    Activation a = {x, out, size, kind};
    team_run(&(Phase){activate_units, &a, (size + ACTIVATED - 1) / ACTIVATED, 1}, 1, threads);
}

/* Value dimensions have to be a multiple of this. */
int verbatim_lanes(void) { return LANES; }

/* Bytes of a layer's scratch space for a row. */
long verbatim_layer_scratch(const Layer *l) {
    const Matrix *up = l->gate_up, *down = l->down;
    long a = larger(row_bytes(l->qkv->kind, l->dim), row_bytes(l->o->kind, l->heads * l->value_dim));
    long b = up ? larger(row_bytes(up->kind, l->dim), row_bytes(down->kind, l->inner)) : 0;
    return 4 * (beside(l) + between(l)) + larger(a, b);
}

/* Decoder layers over a step's rows, one after the other: x, out, other [rows, dim]; cos, sin [rows, angles]; scratch: rows *
 * the largest verbatim_layer_scratch bytes; keys, values: of each layer. `other` is needed from two layers on. The first
 * `attended` rows have a place in the cache; the others are padding. The rest as in verbatim_attention. */
void verbatim_layers(const Layer *const *layers, long layer_count, const float *x, const float *cos, const float *sin,
                     float *out, float *other, float *scratch, float *const *keys, float *const *values,
                     const int64_t *slots, uint8_t *finite, Part *parts, long rows, long attended, long cache_slots, long count,
                     int threads) {
    for (long i = 0; i < layer_count; i++) {
        const Layer *l = layers[i];
        LayerCall c = {.layer = l, .x = x, .cos = cos, .sin = sin, .rows = rows};
        c.out = (layer_count - i) % 2 ? out : other;
        start_layer(&c, scratch);
        c.attention = (Attention){
            c.query, c.key, c.value, l->key_dim, c.query_row, l->key_dim, c.key_row, l->value_dim, c.value_row, c.attended,
            keys[i], values[i], slots, finite, l->sinks, parts, attended, l->heads, l->kv_heads, l->key_dim, l->value_dim,
            cache_slots, count, 0, l->window, l->chunk, l->scale, l->softcap};
        cut_attention(&c.attention);
        run_layer(&c, threads);
        x = c.out;
    }
}

/* Bytes of a mixture's scratch space. */
long verbatim_experts_scratch(const Experts *e, long rows, long choices) { return experts_scratch(e, rows, choices); }

/* A mixture of experts: x, out [rows, dim]; chosen, weights [rows, choices]; scratch: verbatim_experts_scratch bytes. */
void verbatim_experts(const Experts *e, const float *x, const int64_t *chosen, const float *weights, float *out, void *scratch,
                      long rows, long choices, int threads) {
    ExpertsCall c = {.experts = e, .x = x, .weights = weights, .out = out, .rows = rows, .choices = choices};
    run_experts(&c, chosen, scratch, threads);
}
