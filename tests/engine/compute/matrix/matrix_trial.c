/* Products on the matrix unit beside the same without it, bit for bit: see test_matrix_products.py. Prints the number of
 * products and returns 0, or says which one differs.
 *
 *   matrix_trial N S     N random products from the seed S
 *
 * Shapes are odd more often than not, and every buffer has exactly the size that the kernels ask for: compiled with
 * AddressSanitizer, this notices whoever reads or writes beyond one. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>

#include "grouped_packing.h"
#include "packing.h"

#if !MATRIX_UNIT
#error "there is nothing to try"
#endif

static unsigned state;

static unsigned draw(unsigned below) {
    state = state * 1664525u + 1013904223u;
    return (state >> 8) % below;
}

static float number(void) { return (float)((int)draw(20001) - 10000) / (float)(1 << draw(20)); }

static void *filled(size_t count, int kind) {
    char *out = malloc(count * part_size(kind) + 1);
    for (size_t i = 0; i < count && kind != NONE; i++) {
        float wide = number();
        uint16_t half = (uint16_t)((draw(2) << 15) | ((10 + draw(10)) << 10) | draw(1024));
        if (kind == F32) memcpy(out + 4 * i, &wide, 4);
        else if (kind == F16) memcpy(out + 2 * i, &half, 2);
        else if (kind == BF16) memcpy(out + 2 * i, (char *)&wide + 2, 2);
        else out[i] = (char)draw(256);
    }
    return out;
}

typedef struct {
    Matrix matrix;
    Format format;
} Weight;

static void make_int8(Weight *w, long depth) {
    long columns = w->matrix.columns;
    float *numbers = filled((size_t)(columns * depth), F32);
    char *packed = malloc(panels_of(columns, INT8) * int8_stride(depth));
    Packing p = {numbers, packed, columns, depth, INT8, 0};
    pack_panels(&p, 0, panels_of(columns, INT8));
    free(numbers);
    w->matrix.weight = packed, w->matrix.kind = INT8;
}

static void make_grouped(Weight *w, long depth) {
    static const int bits[] = {4, 5, 6, 8}, sizes[] = {16, 32, 64, 128}, floats[] = {F16, BF16, F32}, whole[] = {U8, S8};
    Format *f = &w->format;
    long columns = w->matrix.columns;
    int levels = (int)draw(2);
    *f = (Format){.bits = bits[draw(4)], .group = sizes[draw(4)], .per = 1};
    if (levels) f->per = CHUNK_K / f->group;
    f->scales = levels ? whole[draw(2)] : floats[draw(3)], f->supers = levels ? floats[draw(3)] : NONE;
    if (draw(2)) f->minima = levels ? whole[draw(2)] : floats[draw(3)], f->minimum_supers = levels ? floats[draw(3)] : NONE;
    if (draw(3) == 0) f->zeros = U8;
    else f->zero = draw(2) ? (int)draw(1 << f->bits) : 0;
    long groups = (depth + f->group - 1) / f->group, supers = (groups + f->per - 1) / f->per;
    size_t all = (size_t)(columns * groups), above = (size_t)(columns * supers);
    uint8_t *numbers = malloc((size_t)(columns * depth));
    for (long i = 0; i < columns * depth; i++) numbers[i] = (uint8_t)draw(1u << f->bits);
    void *parts[] = {filled(all, f->scales), filled(above, f->supers), filled(all, f->minima), filled(above, f->minimum_supers),
                     filled(all, f->zeros)};
    long panels = panels_of(columns, GROUPED);
    char *packed = malloc((size_t)panels * grouped_stride(f, depth));
    GroupPacking p = {*f, {numbers, parts[0], parts[1], parts[2], parts[3], parts[4]}, packed, columns, depth, 0};
    pack_group_panels(&p, 0, panels);
    free(numbers);
    for (int i = 0; i < 5; i++) free(parts[i]);
    w->matrix.weight = packed, w->matrix.kind = GROUPED, w->matrix.format = f;
}

static float *multiplied(const float *x, const Matrix *matrices, long rows, long depth, long count, int use, int threads) {
    long columns = 0;
    for (long i = 0; i < count; i++) columns += matrices[i].columns;
    float *out = malloc(sizeof(float) * (size_t)(rows * columns));
    memset(out, 0xff, sizeof(float) * (size_t)(rows * columns));
    char *scratch = malloc((size_t)(rows * row_bytes(matrices->kind, depth)));
    matrix_unit = use;
    Call call = call_of(x, scratch, out, matrices, rows, depth, count);
    if ((call.tallest == MATRIX_ROWS) != (use && rows >= MATRIX_FROM)) abort();
    team_run((Phase[]){laying_out(&call), multiplying(&call)}, 2, threads);
    free(scratch);
    return out;
}

/* One random product of one or two weights; 0 if its bits differ. */
static int try_one(void) {
    static const long depths[] = {1, 3, 4, 5, 16, 31, 32, 33, 63, 64, 65, 128, 130, 190, 256, 257};
    long depth = draw(3) ? depths[draw(16)] : 1 + draw(600), count = 1 + draw(2);
    long rows = draw(4) ? MATRIX_FROM + draw(2 * MATRIX_FROM) : MATRIX_FROM - 1 + 16 * draw(8);
    int kind = draw(3) ? GROUPED : INT8;
    Weight weights[2] = {0};
    Matrix matrices[2];
    long columns = 0;
    for (long i = 0; i < count; i++) {
        Matrix *m = &weights[i].matrix;
        m->columns = 1 + draw(90), columns += m->columns;
        m->bias = draw(2) ? filled((size_t)m->columns, F32) : NULL;
        if (kind == INT8) make_int8(weights + i, depth);
        else make_grouped(weights + i, depth);
        matrices[i] = *m;
    }
    float *x = filled((size_t)(rows * depth), F32);
    if (draw(4) == 0) memset(x + draw((unsigned)rows) * depth, 0, sizeof(float) * (size_t)depth);
    float *right = multiplied(x, matrices, rows, depth, count, 0, 1);
    float *found = multiplied(x, matrices, rows, depth, count, 1, 1 + (int)draw(3));
    int same = !memcmp(right, found, sizeof(float) * (size_t)(rows * columns));
    if (!same)
        for (long i = 0; i < count; i++)
            fprintf(stderr, "%ld rows, depth %ld, %ld columns, kind %d, %d bits in groups of %d: other bits\n", rows, depth,
                    matrices[i].columns, kind, weights[i].format.bits, weights[i].format.group);
    for (long i = 0; i < count; i++) free((void *)matrices[i].weight), free((void *)matrices[i].bias);
    free(x), free(right), free(found);
    return same;
}

int main(int count, char **arguments) {
    if (count != 3) return 2;
    long products = atol(arguments[1]);
    state = (unsigned)atol(arguments[2]);
    int refused = ask_for_tiles();
    if (refused) return fprintf(stderr, "the system refuses it: %s\n", strerror(refused)), 75;
    for (long i = 0; i < products; i++)
        if (!try_one()) return 1;
    printf("%ld\n", products);
    return 0;
}
