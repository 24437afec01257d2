/* Products with weights that are whole numbers of 4 to 8 bits in groups with a scale, and perhaps a minimum or a zero, each.
 *
 * The chain of a number: for each 32 k's (each 16 where the weight's groups have 16)
 *     whole = sum of number · byte  -  zero · sum of bytes           exact
 *     s = fma(float(whole), x_scale · w_scale, s)
 *     s = fma(-minimum, x_scale · float(sum of bytes), s)            if there are minima
 * from 0, then + bias. A scale or minimum of two levels is their product, rounded to float32. Inputs: `grouped_tile`.
 *
 * The numbers are the unsigned factor of VNNI's products of quads, or without it of `vpmaddubsw`, whose sums of two are added
 * in 16 bits as long as they cannot overflow: 8 quads of 4 bits, 4 of 5 and 2 of 6 (2 · 63 · 127 · 2 < 2^15). There 128 is
 * taken off numbers of 8 bits and off their zeros (OFFSET_OF), which leaves number - zero as it was, and their sign is given
 * to the input: 2 · 128 · 127 < 2^15. */
#pragma once
#include "grouped_input.h"

/* What belongs to the groups of a chunk and a panel, in float32 and int32. */
typedef struct {
    float scales[MOST_GROUPS][PANEL_G], minima[MOST_GROUPS][PANEL_G];
    int32_t zeros[MOST_GROUPS][PANEL_G];
} Decoded;

/* A chunk of a panel and of a tile of rows. */
typedef struct {
    const char *x, *facts, *w; /* the first block's */
    const Decoded *decoded;
    float *totals;             /* [rows][PANEL_G] */
    long steps;
    int shift;                 /* of a block's first k: its group; of a half block's where `halves` */
    int halves, zeros, minima, ahead;
} Piece;

INLINE wf part_at(int kind, const char *at, long i) {
    switch (kind) {
        case F16: return F_FROM_F16(at + i * 2);
        case BF16: return F_FROM_BF16(at + i * 2);
        case F32: return F_LOAD((const float *)(at + i * 4));
        case U8: return F_FROM_INT(I_FROM_U8(at + i));
        default: return F_FROM_INT(I_FROM_S8(at + i));
    }
}

INLINE void decode_as(int kind, int super_kind, const char *at, const char *supers, const Chunk *c, long per, float *out) {
    if (super_kind == NONE)
        for (long i = 0; i < c->groups * PANEL_G; i += WIDTH) F_STORE(out + i, part_at(kind, at, i));
    else
        for (long super = 0; super < c->super_groups; super++) {
            wf s0 = part_at(super_kind, supers, super * PANEL_G), s1 = part_at(super_kind, supers, super * PANEL_G + WIDTH);
            long stop = (super + 1) * per < c->groups ? (super + 1) * per : c->groups;
            for (long i = super * per * PANEL_G; i < stop * PANEL_G; i += PANEL_G) {
                F_STORE(out + i, F_MUL(part_at(kind, at, i), s0));
                F_STORE(out + i + WIDTH, F_MUL(part_at(kind, at, i + WIDTH), s1));
            }
        }
}

/* Scales or minima of a chunk → out [groups][PANEL_G]. A loop of its own for each combination. */
static void decode(int kind, int super_kind, const char *at, const char *supers, const Chunk *c, long per, float *out) {
#define DECODE(K, S) case K * 8 + S: decode_as(K, S, at, supers, c, per, out); break;
    switch (kind * 8 + super_kind) {
        DECODE(F16, NONE) DECODE(BF16, NONE) DECODE(F32, NONE)
        DECODE(U8, F16) DECODE(U8, BF16) DECODE(U8, F32)
        DECODE(S8, F16) DECODE(S8, BF16) DECODE(S8, F32)
    }
#undef DECODE
}

INLINE void decode_chunk(const Format *f, const Chunk *c, const char *w, int ahead, Decoded *d) {
    if (ahead)
        for (size_t i = 0; i < c->numbers; i += 64) PREFETCH(w + i + AHEAD_G);
    decode(f->scales, f->supers, w + c->scales, w + c->supers, c, f->per, d->scales[0]);
    if (f->minima) decode(f->minima, f->minimum_supers, w + c->minima, w + c->minimum_supers, c, f->per, d->minima[0]);
    if (f->group == 16 && c->groups & 1) /* the last block's second half: nothing of it is there */
        for (int i = 0; i < PANEL_G; i++) d->scales[c->groups][i] = d->minima[c->groups][i] = 0;
    if (f->zeros)
        for (long i = 0; i < c->groups * PANEL_G; i += WIDTH) I_STORE(d->zeros[0] + i, I_FROM_U8(w + c->zeros + i));
    if (f->zeros && OFFSET_OF(f->bits))
        for (long i = 0; i < c->groups * PANEL_G; i++) d->zeros[i / PANEL_G][i % PANEL_G] -= OFFSET_OF(f->bits);
}

/* Quad j of a vector of a block, a number a byte. j is a constant. */
INLINE wi quad_at(int bits, const char *w, int j) {
    if (bits == 8) return I_NUMBERS(I_LOAD(w + j * QUAD_VECTOR));
    wi pair = I_LOAD(w + j / 2 * QUAD_VECTOR);
    wi low = I_AND(j & 1 ? I_RIGHT(pair, 4) : pair, I_SET8(15));
    if (bits == 4) return low;
    wi more = I_LOAD(w + (bits == 5 ? 4 : 4 + j / 4) * QUAD_VECTOR);
    int up = bits == 5 ? 4 - j : 4 - j % 4 * 2;
    more = up > 0 ? I_LEFT(more, up) : up < 0 ? I_RIGHT(more, -up) : more;
    return I_OR(low, I_AND(more, I_SET8(bits == 5 ? 16 : 48)));
}

/* ---- for each number of rows ---- */

/* One step of the chain of row r's numbers in vector c, of which `sums` are the sums of number · byte. */
#define CHAIN(r, c, ZEROS, MINIMA)                                                                                       \
    {                                                                                                                    \
        wi whole = SUMS(r, c);                                                                                           \
        if (ZEROS)                                                                                                       \
            whole = I_SUB32(whole, I_TIMES(I_QUAD(of + (ROWS + (r)) * 4), I_LOAD(decoded->zeros[group] + (c) * WIDTH))); \
        wf scale = F_MUL(F_SET(*(const float *)(facts + (r) * 4)), F_LOAD(decoded->scales[group] + (c) * WIDTH));        \
        wf sum = F_FMA(F_FROM_INT(whole), scale, TOTAL(r, c));                                                           \
        if (MINIMA)                                                                                                      \
            sum = F_LESS(F_LOAD(decoded->minima[group] + (c) * WIDTH), F_SET(*(const float *)(of + (2 * ROWS + (r)) * 4)), \
                         sum);                                                                                           \
        SET_TOTAL(r, c, sum);                                                                                            \
    }
#define CHAIN_ZERO(r, V) V(CHAIN_ZERO1, r)
#define CHAIN_ZERO1(r, c) CHAIN(r, c, 1, 0)
#define CHAIN_MINIMUM(r, V) V(CHAIN_MINIMUM1, r)
#define CHAIN_MINIMUM1(r, c) CHAIN(r, c, 0, 1)
#define CHAIN_EITHER(r, V) V(CHAIN_EITHER1, r)
#define CHAIN_EITHER1(r, c) CHAIN(r, c, zeros, minima)
/* half: 0 for a whole block, 1 and 2 for its halves. */
#define END_STEP(R, V, half)                                                                                             \
    {                                                                                                                    \
        const char *of = facts + (half) * 2 * ROWS * 4;                                                                  \
        long group = halves ? 2 * step + (half) / 2 : step >> p->shift;                                                  \
        if (zeros && !minima) { R(CHAIN_ZERO, V) }                                                                       \
        else if (minima && !zeros) { R(CHAIN_MINIMUM, V) }                                                               \
        else { R(CHAIN_EITHER, V) }                                                                                      \
    }

/* The totals of one or two rows stay in registers for a whole chunk; those of more are read and written at each step. */
#define TOTAL_AT(r, c) (p->totals + (r) * PANEL_G + (c) * WIDTH)
#define LOAD_TOTAL(r, V) V(LOAD_TOTAL1, r)
#define LOAD_TOTAL1(r, c) wf t##r##c = F_LOAD(TOTAL_AT(r, c));
#define STORE_TOTAL(r, V) V(STORE_TOTAL1, r)
#define STORE_TOTAL1(r, c) F_STORE(TOTAL_AT(r, c), t##r##c);

#define FIRST(Y, r) Y(r, 0)  /* one vector of a row, the first or the second */
#define SECOND(Y, r) Y(r, 1)
#define DECLARE_G(r, V) V(DECLARE_G1, r)
#define DECLARE_G1(r, c) wi a##r##c = I_ZERO();
#define CLEAR_G(r, V) V(CLEAR_G1, r)
#define CLEAR_G1(r, c) a##r##c = I_ZERO();
#define DECLARE_REST(r, V) V(DECLARE_REST1, r)
#define DECLARE_REST1(r, c) wi rest##r##c = I_ZERO();
#define PUT_ASIDE(r, V) V(PUT_ASIDE1, r)
#define PUT_ASIDE1(r, c) rest##r##c = I_MADD16(a##r##c, I_SET16(1)); a##r##c = I_ZERO();

/* a0 += w0 · x, a1 += w1 · x for a row's quad; without VNNI in 16 bits, with registers chosen by hand as in STEP_V2. */
#if QUAD_SUMS
#define STEP_G(r, V) { wi s = I_QUAD(x + (r) * 4); a##r##0 = I_DOT(w0, s, a##r##0); a##r##1 = I_DOT(w1, s, a##r##1); }
#elif WIDTH == 8
#define STEP_G(r, V) { wi s, t; __asm__ volatile(                                                                        \
    "vpbroadcastd %[x], %[s]\n\tvpmaddubsw %[s], %[w0], %[t]\n\tvpaddw %[t], %[a0], %[a0]\n\t"                           \
    "vpmaddubsw %[s], %[w1], %[s]\n\tvpaddw %[s], %[a1], %[a1]"                                                          \
    : [a0] "+x"(a##r##0), [a1] "+x"(a##r##1), [s] "=&x"(s), [t] "=&x"(t)                                                 \
    : [x] "m"(*(const int32_t *)(x + (r) * 4)), [w0] "x"(w0), [w1] "x"(w1)); }
#else
#define STEP_G(r, V) { wi s = I_QUAD(x + (r) * 4);                                                                       \
    a##r##0 = I_ADD16(a##r##0, I_MADD8(w0, s)); a##r##1 = I_ADD16(a##r##1, I_MADD8(w1, s)); }
#endif
/* Two quads of 6 bits for one vector, in 32 bits. */
#define STEP_6(r, V) V(STEP_61, r)
#define STEP_61(r, c)                                                                                                    \
    a##r##c = I_ADD32(a##r##c, I_MADD16(I_ADD16(I_MADD8(w0, I_QUAD(x + (r) * 4)),                                        \
                                                I_MADD8(w1, I_QUAD(x + (ROWS + (r)) * 4))), ones));

/* A quad of 8 bits, in 32 bits: `size` without the sign of `number`, which the input takes. */
#define STEP_8(r, V) V(STEP_81, r)
#define STEP_81(r, c)                                                                                                    \
    a##r##c = I_ADD32(a##r##c, I_MADD16(I_MADD8(size, I_SIGNED(I_QUAD(x + (r) * 4), number)), ones));

typedef void (*Engine)(const Piece *p);
enum { ENGINES = 4 }; /* for 4, 5, 6 and 8 bits */
#define GLUE_(a, b) a##b
#define GLUE(a, b) GLUE_(a, b)
#define FETCH_AHEAD(bytes) if (p->ahead) for (size_t i = 0; i < (bytes); i += 64) PREFETCH(w + i + AHEAD_G);

#define ROWS 1
#define R R1
#include "grouped_engines.h"
#define ROWS 2
#define R R2
#include "grouped_engines.h"
#define ROWS 3
#define R R3
#include "grouped_engines.h"
#define ROWS 4
#define R R4
#include "grouped_engines.h"
#define ROWS 5
#define R R5
#include "grouped_engines.h"
#define ROWS 6
#define R R6
#include "grouped_engines.h"

INLINE Engine engine_of(int bits, int rows) {
    static const Engine *const engines[TALLEST] = {engines_1, engines_2, engines_3, engines_4, engines_5, engines_6};
    return engines[rows - 1][bits == 8 ? 3 : bits - 4];
}

/* ---- products ---- */

/* A piece of a panel but for its place; `decoded` gets the zeros that all groups share. */
INLINE Piece piece_of_panel(const Format *f, Decoded *decoded, int ahead) {
    const int offset = OFFSET_OF(f->bits); /* is taken off numbers and zeros */
    if (!f->zeros && f->zero != offset)
        for (int g = 0; g < MOST_GROUPS; g++)
            for (int i = 0; i < PANEL_G; i++) decoded->zeros[g][i] = f->zero - offset;
    return (Piece){.decoded = decoded, .shift = f->group >= 128 ? 2 : f->group >= 64, .halves = f->group == 16,
                   .zeros = f->zeros || f->zero != offset, .minima = f->minima != NONE, .ahead = ahead};
}

/* What all panels of a product have in common. */
typedef struct {
    Chunk whole, last; /* of CHUNK_K k's, and of what is left of the depth, if anything is */
    size_t stride;
    Decoded decoded;
    Piece piece;
} Panels;

/* One panel for one tile. A panel is one stream of bytes, followed by the next: several at once were slower, for what is
 * fetched ahead of one is the beginning of another. */
static void grouped_panel(const Call *call, const Matrix *m, const char *x, int rows, long panel, Panels *all, float *out) {
    const Engine engine = engine_of(m->format->bits, rows);
    const long depth = call->depth;
    float totals[TALLEST * PANEL_G];
    Piece p = all->piece;
    p.x = x, p.facts = x + (size_t)steps_of(depth) * STEP_K * rows, p.totals = totals;
    p.w = m->weight + (size_t)panel * all->stride;
    memset(totals, 0, sizeof(float) * (size_t)rows * PANEL_G);
    for (long k = 0; k < depth; k += CHUNK_K) {
        const Chunk *c = depth - k < CHUNK_K ? &all->last : &all->whole;
        p.steps = steps_of(depth - k < CHUNK_K ? depth - k : CHUNK_K);
        decode_chunk(m->format, c, p.w, p.ahead, &all->decoded);
        p.w += c->numbers;
        engine(&p);
        p.x += p.steps * STEP_K * rows, p.facts += p.steps * FACTS * 4 * rows, p.w += c->bytes - c->numbers;
    }
    finish8(rows, PANEL_G, totals, m, out, panel * PANEL_G);
}

static void grouped_panels(const Call *call, const Matrix *m, float *out, long begin, long end) {
    const Format *f = m->format;
    const long depth = call->depth;
    Panels all = {.whole = chunk_of(f, CHUNK_K), .stride = grouped_stride(f, depth)};
    if (depth % CHUNK_K) all.last = chunk_of(f, depth % CHUNK_K);
    all.piece = piece_of_panel(f, &all.decoded, 0);
    long group = panels_at_once(call->rows, all.stride);
    for (long g = begin; g < end; g += group) {
        long stop = g + group < end ? g + group : end;
        for (long row = 0; row < call->rows;) {
            int rows = height(TALLEST, call->rows - row);
            const char *x = call->tiles + row * grouped_row(depth);
            all.piece.ahead = row == 0;
            for (long p = g; p < stop; p++) grouped_panel(call, m, x, rows, p, &all, out + row * m->columns);
            row += rows;
        }
    }
}
