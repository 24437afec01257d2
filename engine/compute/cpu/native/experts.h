/* A mixture of experts: each row's sum over the experts that were chosen for it. */
#pragma once
#include "products.h"
#include "rows.h"

/*   out = chain over a row's choices, in the order they are given: s = fma(weight, down(activation(gate(x)) * up(x)), s)
 *
 * beginning at 0. The rows of one expert are multiplied together, so that its weights are read once. A row's chain names
 * neither its neighbours nor what else an expert computes. */

/* Layout shared with engine/compute/cpu/kernel_calls.py. */
typedef struct {
    const Matrix *gate_up, *down;                 /* [experts]: 2 * inner columns, those of gate first; dim columns */
    long dim, inner, experts, row_bytes;          /* row_bytes: of a row laid out for any of the products */
    int activation;
} Experts;

/* One expert with its rows. */
typedef struct {
    long expert, first, rows; /* its number, and its pairs in the order of `row_of` */
    Call up, down;
    long up_before, down_before, pieces_before; /* units of the experts before it */
} Busy;

/* A pair is a row and one of its choices. Pairs are sorted by expert, and those of one by row. */
typedef struct {
    const Experts *experts;
    const float *x, *weights; /* [rows, dim], [rows, choices] */
    float *out;               /* [rows, dim] */
    long rows, choices, busy;
    Busy *of;                 /* [busy] */
    long *row_of, *place;     /* the row of each pair; where each row's choice is among the pairs, or -1 */
    float *gathered, *gate_up, *active, *product; /* by pair: [dim], [2 * inner], [inner], [dim] */
} ExpertsCall;

/* Floats of a pair. */
INLINE long pair_floats(const Experts *e) { return 2 * e->dim + 3 * e->inner; }

/* Sort the pairs. Choices that are no expert are left out: nothing is added for them. */
static void sort_pairs(ExpertsCall *c, const int64_t *chosen, long *count) {
    const Experts *e = c->experts;
    long pairs = c->rows * c->choices, at = 0;
    for (long i = 0; i < e->experts; i++) count[i] = 0;
    for (long i = 0; i < pairs; i++)
        if (chosen[i] >= 0 && chosen[i] < e->experts) count[chosen[i]]++;
    for (long i = 0; i < e->experts; i++) {
        if (count[i]) c->of[c->busy++] = (Busy){.expert = i, .first = at, .rows = count[i]};
        at += count[i], count[i] = at - count[i];
    }
    for (long i = 0; i < pairs; i++) {
        int known = chosen[i] >= 0 && chosen[i] < e->experts;
        c->place[i] = known ? count[chosen[i]]++ : -1;
        if (known) c->row_of[c->place[i]] = i / c->choices;
    }
}

/* Prepare an expert's products; `before` are the units of the experts before it. */
static void prepare_expert(ExpertsCall *c, Busy *b, char *tiles, long before[3]) {
    const Experts *e = c->experts;
    long expert = b->expert;
    char *own = tiles + b->first * e->row_bytes;
    b->up = call_of(c->gathered + b->first * e->dim, own, c->gate_up + b->first * 2 * e->inner, e->gate_up + expert, b->rows,
                    e->dim, 1);
    b->down = call_of(c->active + b->first * e->inner, own, c->product + b->first * e->dim, e->down + expert, b->rows,
                      e->inner, 1);
    b->up_before = before[0], b->down_before = before[1], b->pieces_before = before[2];
    before[0] += b->up.panels, before[1] += b->down.panels, before[2] += tiles_of(&b->down) * pieces_of(&b->down);
}

/* An expert's rows, side by side and laid out. */
static void gather_rows(void *data, long begin, long end) {
    const ExpertsCall *c = data;
    long dim = c->experts->dim;
    for (const Busy *b = c->of + begin; b < c->of + end; b++) {
        for (long i = b->first; i < b->first + b->rows; i++)
            memcpy(c->gathered + i * dim, c->x + c->row_of[i] * dim, sizeof(float) * (size_t)dim);
        for (long tile = 0; tile < tiles_of(&b->up); tile++) {
            int rows;
            long first = tile_at(&b->up, tile, &rows);
            lay_out(&b->up, first, rows, 0, dim);
        }
    }
}

static void multiply_up(void *data, long begin, long end) {
    const ExpertsCall *c = data;
    for (const Busy *b = c->of; b < c->of + c->busy; b++) {
        long from = larger(begin - b->up_before, 0), to = end - b->up_before;
        if (to > b->up.panels) to = b->up.panels;
        if (from < to) multiply((void *)&b->up, from, to);
    }
}

static void multiply_down(void *data, long begin, long end) {
    const ExpertsCall *c = data;
    for (const Busy *b = c->of; b < c->of + c->busy; b++) {
        long from = larger(begin - b->down_before, 0), to = end - b->down_before;
        if (to > b->down.panels) to = b->down.panels;
        if (from < to) multiply((void *)&b->down, from, to);
    }
}

/* activation(gate) * up, laid out for the product after it. */
static void activate_experts(void *data, long begin, long end) {
    const ExpertsCall *c = data;
    long inner = c->experts->inner;
    for (const Busy *b = c->of; b < c->of + c->busy; b++) {
        long from = larger(begin - b->pieces_before, 0), to = end - b->pieces_before;
        if (to > tiles_of(&b->down) * pieces_of(&b->down)) to = tiles_of(&b->down) * pieces_of(&b->down);
        for (long unit = from; unit < to; unit++) {
            long first, low, high;
            int rows;
            piece_of(&b->down, unit, &first, &rows, &low, &high);
            for (long i = b->first + first; i < b->first + first + rows; i++) {
                const float *gate = c->gate_up + i * 2 * inner + low;
                activate(c->experts->activation, gate, gate + inner, c->active + i * inner + low, high - low);
            }
            lay_out(&b->down, first, rows, low, high);
        }
    }
}

/* The sum over a row's choices. */
static void sum_choices(void *data, long begin, long end) {
    const ExpertsCall *c = data;
    long dim = c->experts->dim;
    for (long row = begin; row < end; row++) {
        float *out = c->out + row * dim;
        for (long i = 0; i < dim; i++) out[i] = 0;
        for (long j = row * c->choices; j < (row + 1) * c->choices; j++) {
            if (c->place[j] < 0) continue;
            const float *y = c->product + c->place[j] * dim, weight = c->weights[j];
            for (long i = 0; i < dim; i++) out[i] = __builtin_fmaf(weight, y[i], out[i]);
        }
    }
}

/* scratch, from its beginning: longs for `place`, `row_of` and counts; a Busy for each expert there may be; floats; tiles. */
static void run_experts(ExpertsCall *c, const int64_t *chosen, char *scratch, int threads) {
    const Experts *e = c->experts;
    long pairs = c->rows * c->choices, before[3] = {0};
    c->place = (long *)scratch, c->row_of = c->place + pairs;
    long *count = c->row_of + pairs;
    c->of = (Busy *)(count + e->experts), c->busy = 0;
    c->gathered = (float *)(c->of + e->experts), c->gate_up = c->gathered + pairs * e->dim;
    c->active = c->gate_up + pairs * 2 * e->inner, c->product = c->active + pairs * e->inner;
    sort_pairs(c, chosen, count);
    for (Busy *b = c->of; b < c->of + c->busy; b++) prepare_expert(c, b, (char *)(c->product + pairs * e->dim), before);
    long few = c->rows < TALLEST / 2 ? TALLEST / 2 : 1; /* pieces that are not worth sharing */
    const Phase phases[] = {
        {gather_rows, c, c->busy, few},
        {multiply_up, c, before[0], 1},
        {activate_experts, c, before[2], few},
        {multiply_down, c, before[1], 1},
        {sum_choices, c, c->rows, few},
    };
    team_run(phases, sizeof phases / sizeof *phases, threads);
}

/* Bytes of scratch for some rows. */
INLINE long experts_scratch(const Experts *e, long rows, long choices) {
    long pairs = rows * choices;
    return (2 * pairs + e->experts) * (long)sizeof(long) + e->experts * (long)sizeof(Busy)
           + pairs * (4 * pair_floats(e) + e->row_bytes);
}
