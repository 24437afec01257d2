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
 *   attention, norm    see there
 *   layer              the functions here, one after the other: the bits of each called by itself
 *
 * Vectors run over the columns of the result, never along k: there is nothing to reduce at the end, and wider vectors give
 * the same bits. (oneDNN's packed float32 product has the same chain on AVX2, and so the same bits: a test compares them.)
 *
 * Weights are stored in panels of neighbouring columns, k by k, so that a thread reads them as one stream. A weight that
 * bfloat16 holds without loss is stored as such and widened in a register: the same bits at half the memory traffic.
 */
#define _GNU_SOURCE /* pthread_setname_np */
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "team.h"

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define LANES 16
typedef __m512 vf;
#define ZERO() _mm512_setzero_ps()
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, v) _mm512_storeu_ps(p, v)
#define SET(x) _mm512_set1_ps(x)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define ADD(a, b) _mm512_add_ps(a, b)
#define SUB(a, b) _mm512_sub_ps(a, b)
#define MUL(a, b) _mm512_mul_ps(a, b)
#define DIV(a, b) _mm512_div_ps(a, b)
#define NEGATIVE(a, yes, no) _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, ZERO(), _CMP_LT_OQ), no, yes)
#define MINUS_ABS(a) _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(a), _mm512_set1_epi32((int)0x80000000)))
#define LOW_HALF(p) _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))
#define HIGH_HALF(p) _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32((int)0xffff0000)))
#else
#define LANES 8
typedef __m256 vf;
#define ZERO() _mm256_setzero_ps()
#define LOAD(p) _mm256_loadu_ps(p)
#define STORE(p, v) _mm256_storeu_ps(p, v)
#define SET(x) _mm256_set1_ps(x)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define ADD(a, b) _mm256_add_ps(a, b)
#define SUB(a, b) _mm256_sub_ps(a, b)
#define MUL(a, b) _mm256_mul_ps(a, b)
#define DIV(a, b) _mm256_div_ps(a, b)
#define NEGATIVE(a, yes, no) _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, ZERO(), _CMP_LT_OQ))
#define MINUS_ABS(a) _mm256_or_ps(a, SET(-0.0f))
#define LOADI(p) _mm256_loadu_si256((const __m256i *)(p))
#define LOW_HALF(p) _mm256_castsi256_ps(_mm256_slli_epi32(LOADI(p), 16))
#define HIGH_HALF(p) _mm256_castsi256_ps(_mm256_and_si256(LOADI(p), _mm256_set1_epi32((int)0xffff0000)))
#endif

enum {
    FLOAT32 = 0,
    BFLOAT16 = 1,
    INT8 = 2,
    PANEL = 2 * LANES, /* columns of the result that are stored together */
    BLOCK = 1024,      /* k's in a chain */
    GROUP = 128,       /* k's that share a scale (int8) */
    TALLEST = 6,       /* rows of a tile: 6 by 2 vectors of sums leave 4 of 16 registers */
    CACHED = 256 << 10, /* bytes of weights that stay in a core's second-level cache while all rows pass by */
    WORTH = 32 << 10,  /* bytes of weights that are worth taking by themselves, for one row */
    DEEP = 8 * GROUP   /* k's of a tile that are laid out at once */
};

/* One matrix of a call. Layout shared with engine/compute/cpu/kernel_calls.py. */
typedef struct {
    const char *weight; /* packed */
    const float *bias;  /* [columns] or NULL */
    long columns;
} Matrix;

typedef struct {
    const float *input; /* [rows, depth] */
    char *tiles;        /* the same, tile by tile: [depth][rows of the tile] */
    float *out;         /* one [rows, columns] after the other */
    const Matrix *matrices;
    long rows, depth, count, panels;
    int kind;
    const float *residual; /* [rows, columns] or NULL: then sum = residual + out, for a single matrix */
    float *sum;
} Call;

INLINE long larger(long a, long b) { return a > b ? a : b; }

/* 7 rows are 4 and 3, not 6 and 1. */
INLINE int height(long rows) {
    return rows <= TALLEST ? (int)rows : rows < 2 * TALLEST ? (int)((rows + 1) / 2) : TALLEST;
}

/* How many tiles that makes of all rows, and where the one with number `tile` begins. */
INLINE long whole_tiles(long rows) { return rows < 2 * TALLEST ? 0 : rows / TALLEST - 1; }
INLINE long tiles_of(long rows) { return whole_tiles(rows) + 1 + (rows - whole_tiles(rows) * TALLEST > TALLEST); }
INLINE long tile_start(long rows, long tile) {
    long whole = whole_tiles(rows), row = (tile < whole ? tile : whole) * TALLEST;
    return tile > whole ? row + height(rows - row) : row;
}

/* A tile's sums are named variables, which every compiler keeps in registers: V2, V4, V8 name the vectors of a row,
 * R1 … R6 the rows. */
#define V2(Y, r) Y(r, 0) Y(r, 1)
#define V4(Y, r) V2(Y, r) Y(r, 2) Y(r, 3)
#define V8(Y, r) V4(Y, r) Y(r, 4) Y(r, 5) Y(r, 6) Y(r, 7)
#define R1(X, V) X(0, V)
#define R2(X, V) R1(X, V) X(1, V)
#define R3(X, V) R2(X, V) X(2, V)
#define R4(X, V) R3(X, V) X(3, V)
#define R5(X, V) R4(X, V) X(4, V)
#define R6(X, V) R5(X, V) X(5, V)
#define AT(c) (w + ((c) >> 1) * stride + ((c) & 1) * sizeof(vf)) /* two vectors a panel */

#define DECLARE_1(r, c) vf a##r##c = ZERO();
#define DECLARE(r, V) V(DECLARE_1, r)
/* a = fma(x[r], w, a) for a row's vectors. As the instructions themselves: left to itself a compiler runs out of registers
 * here, and moves sums to memory and back in the innermost loop (a third of the speed). */
#define FUSE(c) "vfmadd231ps %[w" #c "], %[s], %[a" #c "]\n\t"
#define SUM(r, c) [a##c] "+v"(a##r##c)
#define WEIGHT(c) [w##c] "v"(w##c)
#define STEP(r, V) STEP_##V(r)
#define STEP_V1(r) { vf s; __asm__ volatile("vbroadcastss %[x], %[s]\n\t" FUSE(0)                                         \
    : SUM(r, 0), [s] "=&v"(s) : [x] "m"(x[r]), WEIGHT(0)); }
#define STEP_V2(r) { vf s; __asm__ volatile("vbroadcastss %[x], %[s]\n\t" FUSE(0) FUSE(1)                                 \
    : SUM(r, 0), SUM(r, 1), [s] "=&v"(s) : [x] "m"(x[r]), WEIGHT(0), WEIGHT(1)); }
#define STEP_V4(r) { vf s; __asm__ volatile("vbroadcastss %[x], %[s]\n\t" FUSE(0) FUSE(1) FUSE(2) FUSE(3)                 \
    : SUM(r, 0), SUM(r, 1), SUM(r, 2), SUM(r, 3), [s] "=&v"(s)                                                           \
    : [x] "m"(x[r]), WEIGHT(0), WEIGHT(1), WEIGHT(2), WEIGHT(3)); }
#define STEP_1(r, c) a##r##c = FMA(s, w##c, a##r##c);
#define STEP_V8(r) { vf s = SET(x[r]); V8(STEP_1, r) }
#define KEEP_1(r, c) sums[r][c] = a##r##c;
#define KEEP(r, V) V(KEEP_1, r)
#define WORD_LOW(r, c) vf w##c = LOW_HALF(AT(c));
#define WORD_HIGH(r, c) vf w##c = HIGH_HALF(AT(c));
/* The first rows bring a panel from memory: it is fetched two pages ahead. One or two rows are faster without. */
#define AHEAD(r, c) if (((c) & 1) == 0) _mm_prefetch(AT(c) + 8192, _MM_HINT_T0);
#define WORD_WHOLE(r, c) vf w##c = LOAD((const float *)AT(c));

/* tile_RV: R rows by V vectors over `count` k's. The empty asm keeps the compiler from holding both halves of a pair in
 * registers that it does not have. */
#define TILE(ROWS, R, VECTORS, V)                                                                                        \
    INLINE void tile_##ROWS##VECTORS(int kind, int ahead, const float *x, const char *w, size_t stride, long count,      \
                                     vf sums[ROWS][VECTORS]) {                                                           \
        R(DECLARE, V)                                                                                                    \
        if (kind == BFLOAT16) {                                                                                          \
            for (long k = 0; k + 1 < count; k += 2, w += PANEL * 4) {                                                    \
                if (ROWS > 2 && ahead) { V(AHEAD, 0) }                                                                   \
                { V(WORD_LOW, 0) R(STEP, V) }                                                                            \
                x += ROWS;                                                                                               \
                __asm__ volatile("" ::: "memory");                                                                       \
                { V(WORD_HIGH, 0) R(STEP, V) }                                                                           \
                x += ROWS;                                                                                               \
            }                                                                                                            \
            if (count & 1) { V(WORD_LOW, 0) R(STEP, V) }                                                                 \
        } else                                                                                                           \
            for (long k = 0; k < count; k++, w += PANEL * 4, x += ROWS) {                                                \
                if (ROWS > 2 && ahead) { V(AHEAD, 0) }                                                                   \
                V(WORD_WHOLE, 0) R(STEP, V)                                                                              \
            }                                                                                                            \
        R(KEEP, V)                                                                                                       \
    }

TILE(1, R1, 8, V8) TILE(1, R1, 4, V4) TILE(1, R1, 2, V2)
TILE(2, R2, 4, V4) TILE(2, R2, 2, V2)
TILE(3, R3, 4, V4) TILE(3, R3, 2, V2)
TILE(4, R4, 2, V2) TILE(5, R5, 2, V2) TILE(6, R6, 2, V2)

/* Sums of `rows` by `vectors` → out, whose first column is `column`: set or, after the first block, added to. */
INLINE void finish(int rows, int vectors, const vf *sums, const Matrix *m, float *out, long column, int first, int last) {
    for (int c = 0; c < vectors; c++) {
        long n = column + (long)c * LANES, live = m->columns - n;
        for (int r = 0; r < rows && live > 0; r++) {
            float *to = out + r * m->columns + n;
            vf v = sums[r * vectors + c];
            if (live >= LANES) {
                if (!first) v = ADD(LOAD(to), v);
                if (last && m->bias) v = ADD(v, LOAD(m->bias + n));
                STORE(to, v);
            } else {
                float part[LANES];
                STORE(part, v);
                for (long i = 0; i < live; i++) {
                    float s = first ? part[i] : to[i] + part[i];
                    to[i] = last && m->bias ? s + m->bias[n + i] : s;
                }
            }
        }
    }
}

#define FLOAT_CASE(ROWS, VECTORS)                                                                                        \
    {                                                                                                                    \
        vf sums[ROWS][VECTORS];                                                                                          \
        tile_##ROWS##VECTORS(kind, ahead, x + from * ROWS,                                                               \
                             w + (size_t)(kind == BFLOAT16 ? from / 2 : from) * PANEL * 4, stride, to - from, sums);     \
        finish(ROWS, VECTORS, sums[0], m, out, column, from == 0, last);                                                 \
    }

/* One tile: `rows` rows, `panels` panels (4, 2 or 1), k = from … to - 1. */
INLINE void float_tile(int kind, int ahead, int rows, int panels, const float *x, const char *w, size_t stride, long from,
                       long to, int last, const Matrix *m, float *out, long column) {
    if (panels == 4) FLOAT_CASE(1, 8)
    else if (panels == 2) {
        if (rows == 1) FLOAT_CASE(1, 4) else if (rows == 2) FLOAT_CASE(2, 4) else FLOAT_CASE(3, 4)
    } else switch (rows) {
        case 1: FLOAT_CASE(1, 2) break;
        case 2: FLOAT_CASE(2, 2) break;
        case 3: FLOAT_CASE(3, 2) break;
        case 4: FLOAT_CASE(4, 2) break;
        case 5: FLOAT_CASE(5, 2) break;
        default: FLOAT_CASE(6, 2)
    }
}

INLINE size_t float_stride(int kind, long depth) { return (size_t)(kind == BFLOAT16 ? (depth + 1) / 2 : depth) * PANEL * 4; }

/* How many panels stay in the cache while all rows are multiplied with them. With few rows, few: the next are needed soon. */
INLINE long panels_at_once(long rows, size_t bytes) {
    return rows <= 2 * TALLEST || bytes >= CACHED / 4 ? 4 : (long)(CACHED / bytes);
}

/* Panels begin … end - 1 of one matrix. Weights are read from memory once, and from the cache for every tile of rows. */
INLINE void float_panels(int kind, const Call *call, const Matrix *m, float *out, long begin, long end) {
    size_t stride = float_stride(kind, call->depth);
    size_t of_block = float_stride(kind, call->depth < BLOCK ? call->depth : BLOCK);
    long group = panels_at_once(call->rows, of_block);
    for (long g = begin; g < end; g += group) {
        long stop = g + group < end ? g + group : end;
        for (long from = 0; from < call->depth; from += BLOCK) {
            long to = from + BLOCK < call->depth ? from + BLOCK : call->depth;
            for (long row = 0; row < call->rows;) {
                int rows = height(call->rows - row);
                const float *x = (const float *)call->tiles + row * call->depth;
                for (long p = g; p < stop;) {
                    int panels = rows == 1 && stop - p >= 4 ? 4 : rows <= 3 && stop - p >= 2 ? 2 : 1;
                    float_tile(kind, row == 0, rows, panels, x, m->weight + p * stride, stride, from, to, to == call->depth,
                               m, out + row * m->columns, p * PANEL);
                    p += panels;
                }
                row += rows;
            }
        }
    }
}

/* Rows `row` … of one tile, k = from … to - 1, side by side: so that what a tile needs at one k lies together. */
static void interleave(const Call *call, long row, int rows, long from, long to) {
    const float *x = call->input + row * call->depth;
    float *tile = (float *)call->tiles + row * call->depth;
    for (long k = from; k < to; k++)
        for (int r = 0; r < rows; r++) tile[k * rows + r] = x[r * call->depth + k];
}

/* ---- int8 -------------------------------------------------------------------------------------------------------------
 * Four k's of a column stand together (a quad). With VNNI one instruction multiplies and adds a quad; its left factor is
 * unsigned, so 128 is added to the input's bytes and 128 times the weights' sum taken off at the start. Without VNNI bytes
 * are widened to 16 bits and multiplied in pairs, so nothing saturates. Sums of products are whole numbers: exact, and the
 * same on either way. */

#if defined(__AVX512VNNI__) && defined(__AVX512F__)
#define VNNI 1
#define COLUMNS 16 /* of the result in a vector of int32 */
typedef __m512i vi;
#define SUM_START(p) _mm512_loadu_si512(p)
#define QUADS(p) _mm512_loadu_si512(p)
#define INPUT(p) _mm512_set1_epi32(*(const int32_t *)(p))
#define DOT(x, w, s) _mm512_dpbusd_epi32(s, x, w)
#define QUAD_BYTES 4
#elif defined(__AVXVNNI__) || defined(VERBATIM_EMULATE_VNNI)
#define VNNI 1
#define COLUMNS 8
typedef __m256i vi;
#define SUM_START(p) _mm256_loadu_si256((const __m256i *)(p))
#define QUADS(p) _mm256_loadu_si256((const __m256i *)(p))
#define INPUT(p) _mm256_set1_epi32(*(const int32_t *)(p))
#define QUAD_BYTES 4
#if defined(__AVXVNNI__)
#define DOT(x, w, s) _mm256_dpbusd_avx_epi32(s, x, w)
#else /* for a test on a machine without it */
INLINE __m256i emulated_dot(__m256i x, __m256i w, __m256i s) {
    uint8_t a[32];
    int8_t b[32];
    int32_t c[8];
    memcpy(a, &x, 32), memcpy(b, &w, 32), memcpy(c, &s, 32);
    for (int i = 0; i < 32; i++) c[i / 4] += (int32_t)a[i] * b[i];
    memcpy(&s, c, 32);
    return s;
}
#define DOT(x, w, s) emulated_dot(x, w, s)
#endif
#else
#define VNNI 0
#define COLUMNS 4 /* two halves of a quad's sum for each, added in FOLD */
typedef __m256i vi;
#define SUM_START(p) _mm256_setzero_si256()
#define QUADS(p) _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(p)))
#define INPUT(p) _mm256_set1_epi64x(*(const int64_t *)(p))
#define DOT(x, w, s) _mm256_add_epi32(s, _mm256_madd_epi16(x, w))
#define QUAD_BYTES 8 /* of the input: bytes widened to 16 bits */
#endif

enum {
    PANEL8 = 2 * COLUMNS,          /* columns of a panel */
    ROW_BYTES = PANEL8 * 4,        /* of a panel: one quad of each column */
    GROUP_QUADS = GROUP / 4
};

INLINE long quads_of(long depth) { return (depth + 3) / 4; }
INLINE long groups_of(long depth) { return (depth + GROUP - 1) / GROUP; }
/* A panel: its quads; a float scale for each group and column; with VNNI an int32 to begin with, likewise. */
INLINE size_t int8_stride(long depth) {
    return (size_t)quads_of(depth) * ROW_BYTES + (size_t)groups_of(depth) * PANEL8 * (VNNI ? 8 : 4);
}
/* A row of quantised input: its quads, then its scales. */
INLINE size_t int8_row(long depth) { return (size_t)quads_of(depth) * QUAD_BYTES + (size_t)groups_of(depth) * 8; }

#define AT8(c) (w + ((c) >> 1) * stride + ((c) & 1) * (ROW_BYTES / 2))
#define START8(c) (starts + ((c) >> 1) * stride + ((c) & 1) * (COLUMNS * 4))
#define DECLARE8_1(r, c) vi a##r##c = SUM_START(START8(c));
#define DECLARE8(r, V) V(DECLARE8_1, r)
/* The first rows bring a panel from memory, and what the processor fetches ahead by itself ends with the page. Two pages
 * ahead was the best distance (a quarter faster than none, for one row as for eight). */
#define AHEAD8(r, c) if (((c) & 1) == 0) _mm_prefetch(AT8(c) + 8192, _MM_HINT_T0);
#define WORD8(r, c) vi w##c = QUADS(AT8(c));
#define STEP8_1(r, c) a##r##c = DOT(s, w##c, a##r##c);
#define STEP8(r, V) STEP8_##V(r)
#define STEP8_V4(r) { vi s = INPUT(x + (r) * QUAD_BYTES); V4(STEP8_1, r) }
#if VNNI
#define STEP8_V2(r) { vi s = INPUT(x + (r) * QUAD_BYTES); V2(STEP8_1, r) }
#else /* the same as above, with registers chosen by hand as in STEP_V2 */
#define STEP8_V2(r) { vi s, t; __asm__ volatile(                                                                         \
    "vpbroadcastq %[x], %[s]\n\tvpmaddwd %[w0], %[s], %[t]\n\tvpaddd %[t], %[a0], %[a0]\n\t"                             \
    "vpmaddwd %[w1], %[s], %[s]\n\tvpaddd %[s], %[a1], %[a1]"                                                            \
    : [a0] "+x"(a##r##0), [a1] "+x"(a##r##1), [s] "=&x"(s), [t] "=&x"(t)                                                 \
    : [x] "m"(*(const int64_t *)(x + (r) * QUAD_BYTES)), [w0] "x"(w0), [w1] "x"(w1)); }
#endif
#define FOLD8(r, V) V##_FOLD(r)
#define V2_FOLD(r) FOLD(r, 0, a##r##0, a##r##1)
#define V4_FOLD(r) V2_FOLD(r) FOLD(r, 1, a##r##2, a##r##3)
#if VNNI
/* Two vectors of columns from one panel. */
#define PART(r, i, sum, offset)                                                                                          \
    {                                                                                                                    \
        float whole[COLUMNS];                                                                                            \
        int32_t sums32[COLUMNS];                                                                                         \
        memcpy(sums32, &sum, sizeof sum);                                                                                \
        const float *scale = (const float *)(scales + (i) * stride) + (offset);                                          \
        float *to = totals[r] + (i) * PANEL8 + (offset);                                                                 \
        for (int n = 0; n < COLUMNS; n++) whole[n] = (float)sums32[n];                                                   \
        for (int n = 0; n < COLUMNS; n++) to[n] = __builtin_fmaf(whole[n], x_scale[r] * scale[n], to[n]);                \
    }
#define FOLD(r, i, low, high) PART(r, i, low, 0) PART(r, i, high, COLUMNS)
#else
#define FOLD(r, i, low, high)                                                                                            \
    {                                                                                                                    \
        __m256 whole = _mm256_cvtepi32_ps(_mm256_permute4x64_epi64(_mm256_hadd_epi32(low, high), 0xD8));                 \
        __m256 scale = _mm256_mul_ps(_mm256_set1_ps(x_scale[r]), _mm256_loadu_ps((const float *)(scales + (i) * stride)));\
        float *to = totals[r] + (i) * PANEL8;                                                                            \
        _mm256_storeu_ps(to, _mm256_fmadd_ps(whole, scale, _mm256_loadu_ps(to)));                                        \
    }
#endif

/* R rows by V vectors over the whole depth; `totals` [R][V / 2 * PANEL8] begin at 0. */
#define TILE8(ROWS, R, VECTORS, V)                                                                                       \
    INLINE void tile8_##ROWS##VECTORS(int ahead, const char *x, const char *w, size_t stride, long depth,                \
                                      float totals[ROWS][VECTORS / 2 * PANEL8]) {                                        \
        long quads = quads_of(depth);                                                                                    \
        const float *x_scale = (const float *)(x + (size_t)quads * QUAD_BYTES * ROWS);                                   \
        const char *scales = w + (size_t)quads * ROW_BYTES;                                                              \
        const char *starts = scales + (size_t)groups_of(depth) * PANEL8 * 4;                                             \
        memset(totals, 0, sizeof(float) * ROWS * (VECTORS / 2 * PANEL8));                                                \
        for (long from = 0; from < quads; from += GROUP_QUADS) {                                                         \
            long to = from + GROUP_QUADS < quads ? from + GROUP_QUADS : quads;                                           \
            R(DECLARE8, V)                                                                                               \
            for (long q = from; q < to; q++, w += ROW_BYTES, x += ROWS * QUAD_BYTES) {                                   \
                if (ahead && (q & 1) == 0) { V(AHEAD8, 0) }                                                              \
                V(WORD8, 0) R(STEP8, V)                                                                                  \
            }                                                                                                            \
            R(FOLD8, V)                                                                                                  \
            x_scale += ROWS, scales += PANEL8 * 4, starts += PANEL8 * 4;                                                 \
        }                                                                                                                \
        (void)starts;                                                                                                    \
    }

TILE8(1, R1, 4, V4) TILE8(1, R1, 2, V2)
TILE8(2, R2, 4, V4) TILE8(2, R2, 2, V2)
TILE8(3, R3, 2, V2) TILE8(4, R4, 2, V2) TILE8(5, R5, 2, V2) TILE8(6, R6, 2, V2)

INLINE void finish8(int rows, int width, const float *totals, const Matrix *m, float *out, long column) {
    long live = m->columns - column < width ? m->columns - column : width;
    for (int r = 0; r < rows; r++)
        for (long i = 0; i < live; i++)
            out[r * m->columns + column + i] = m->bias ? totals[r * width + i] + m->bias[column + i] : totals[r * width + i];
}

#define INT8_CASE(ROWS, VECTORS)                                                                                         \
    {                                                                                                                    \
        float totals[ROWS][VECTORS / 2 * PANEL8];                                                                        \
        tile8_##ROWS##VECTORS(row == 0, x, w, stride, depth, totals);                                                    \
        finish8(ROWS, VECTORS / 2 * PANEL8, totals[0], m, out, column);                                                  \
    }

static void int8_panels(const Call *call, const Matrix *m, float *all, long begin, long end) {
    long depth = call->depth;
    size_t stride = int8_stride(depth);
    long group = panels_at_once(call->rows, stride);
    for (long g = begin; g < end; g += group) {
        long stop = g + group < end ? g + group : end;
        for (long row = 0; row < call->rows;) {
            int rows = height(call->rows - row);
            const char *x = call->tiles + row * int8_row(depth);
            float *out = all + row * m->columns;
            for (long p = g; p < stop;) {
                int panels = rows <= 2 && stop - p >= 2 ? 2 : 1;
                const char *w = m->weight + p * stride;
                long column = p * PANEL8;
                if (panels == 2) {
                    if (rows == 1) INT8_CASE(1, 4) else INT8_CASE(2, 4)
                } else switch (rows) {
                    case 1: INT8_CASE(1, 2) break;
                    case 2: INT8_CASE(2, 2) break;
                    case 3: INT8_CASE(3, 2) break;
                    case 4: INT8_CASE(4, 2) break;
                    case 5: INT8_CASE(5, 2) break;
                    default: INT8_CASE(6, 2)
                }
                p += panels;
            }
            row += rows;
        }
    }
}

/* `live` numbers → bytes of GROUP numbers and their scale; what is missing counts as 0. A number that is not finite makes
 * the scale NaN, and so the row's result: it must not become a number like any other. */
static float quantise(const float *x, long live, int32_t *bytes) {
    float padded[GROUP];
    memcpy(padded, x, (size_t)live * 4);
    memset(padded + live, 0, (size_t)(GROUP - live) * 4);
    __m256 most = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
    const __m256 sign = _mm256_set1_ps(-0.0f);
    for (int i = 0; i < GROUP; i += 8) {
        __m256 v = _mm256_loadu_ps(padded + i);
        most = _mm256_max_ps(most, _mm256_andnot_ps(sign, v));
        odd = _mm256_add_ps(odd, _mm256_sub_ps(v, v));
    }
    float lanes[8], strange[8], largest = 0, wrong = 0;
    _mm256_storeu_ps(lanes, most), _mm256_storeu_ps(strange, odd);
    for (int i = 0; i < 8; i++) {
        largest = lanes[i] > largest ? lanes[i] : largest;
        wrong += strange[i];
    }
    float inverse = largest > 0 ? 127.0f / largest : 0;
    /* The smallest numbers have no inverse: they are 0, as they are beside anything else. */
    if (!(inverse <= 3.0e38f)) inverse = 0;
    for (int i = 0; i < GROUP; i += 8)
        _mm256_storeu_si256((__m256i *)(bytes + i),
                            _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(padded + i), _mm256_set1_ps(inverse))));
    return inverse > 0 ? largest / 127.0f + wrong : wrong;
}

/* The same as `interleave`, rounded; `from` is where a group begins. */
static void quantise_tile(const Call *call, long row, int rows, long from, long to) {
    long depth = call->depth, quads = quads_of(depth);
    char *tile = call->tiles + row * int8_row(depth);
    float *scales = (float *)(tile + (size_t)quads * QUAD_BYTES * rows);
    for (int r = 0; r < rows; r++)
        for (long g = from / GROUP; g * GROUP < to; g++) {
            int32_t bytes[GROUP];
            long live = depth - g * GROUP < GROUP ? depth - g * GROUP : GROUP;
            scales[g * rows + r] = quantise(call->input + (row + r) * depth + g * GROUP, live, bytes);
            for (long q = 0; q < (live + 3) / 4; q++) {
                char *to_quad = tile + ((g * GROUP_QUADS + q) * rows + r) * QUAD_BYTES;
                __m128i quad = _mm_loadu_si128((const __m128i *)(bytes + 4 * q));
#if VNNI
                quad = _mm_add_epi32(quad, _mm_set1_epi32(128));
                _mm_storeu_si32(to_quad, _mm_packus_epi16(_mm_packus_epi32(quad, quad), quad));
#else
                _mm_storel_epi64((__m128i *)to_quad, _mm_packs_epi32(quad, quad));
#endif
            }
        }
}

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

_Static_assert(KEYS == 16, "attention is written for blocks of 16 keys: one vector with AVX-512, two with AVX2");

#define V1(Y, r) Y(r, 0)
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
#if LANES == 16
    __mmask16 live = _mm512_cmp_ps_mask(x, SET(-87.3f), _CMP_NLT_UQ);
    vf n = _mm512_roundscale_ps(MUL(x, SET(1.44269504088896341f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    vf live = _mm256_cmp_ps(x, SET(-87.3f), _CMP_NLT_UQ);
    vf n = _mm256_round_ps(MUL(x, SET(1.44269504088896341f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
    vf r = FMA(n, SET(-0.693359375f), x);
    r = FMA(n, SET(2.12194440e-4f), r);
    vf p = FMA(SET(1.9875691500e-4f), r, SET(1.3981999507e-3f));
    p = FMA(p, r, SET(8.3334519073e-3f));
    p = FMA(p, r, SET(4.1665795894e-2f));
    p = FMA(p, r, SET(1.6666665459e-1f));
    p = FMA(p, r, SET(5.0000001201e-1f));
    p = FMA(MUL(p, r), r, r);
    p = ADD(p, SET(1.0f));
#if LANES == 16
    __m512i power = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23);
    return _mm512_maskz_mul_ps(live, p, _mm512_castsi512_ps(power));
#else
    __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(live, _mm256_mul_ps(p, _mm256_castsi256_ps(power)));
#endif
}

#define WORD_KEY(r, c) vf w##c = LOAD(k + (c) * LANES);
#define KEEP_SCORE_1(r, c) STORE(scores + (r) * KEYS + (c) * LANES, a##r##c);
#define KEEP_SCORE(r, V) V(KEEP_SCORE_1, r)
#define SUMMED_1(r, c) vf a##r##c = MUL(LOAD(y + (r) * stride + (c) * LANES), SET(keep[r]));
#define SUMMED(r, V) V(SUMMED_1, r)
#define WORD_VALUE(r, c) vf w##c = LOAD(v + (c) * LANES);
#define KEEP_SUM_1(r, c) STORE(y + (r) * stride + (c) * LANES, a##r##c);
#define KEEP_SUM(r, V) V(KEEP_SUM_1, r)

/* scores_R: q [dim][R] · k [dim][16] → scores [R][16]. sum_RV: y [R][V vectors] · keep + p [16][R] · v [16][dim]. */
#define ATTENTION_TILE(ROWS, R)                                                                                          \
    INLINE void scores_##ROWS(const float *x, const float *k, long dim, float *scores) {                                 \
        R(DECLARE, VKEYS)                                                                                                \
        for (long d = 0; d < dim; d++, k += KEYS, x += ROWS) { VKEYS(WORD_KEY, 0) R(STEP, VKEYS) }                       \
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

/* Sixteen numbers summed as a tree: i and i + 8, then i and i + 4, … */
INLINE float tree(const float *p) {
    __m256 v = _mm256_add_ps(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8));
    __m128 u = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    u = _mm_add_ps(u, _mm_movehl_ps(u, u));
    return _mm_cvtss_f32(_mm_add_ss(u, _mm_shuffle_ps(u, u, 1)));
}

INLINE float largest_of(const float *p, float least) {
    __m256 v = _mm256_max_ps(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8));
    __m128 u = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    u = _mm_max_ps(u, _mm_movehl_ps(u, u));
    float found = _mm_cvtss_f32(_mm_max_ss(u, _mm_shuffle_ps(u, u, 1)));
    return found > least ? found : least;
}

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

/* One block of 16 keys, the first of which is token `first`, and one tile. */
static void attend_block(const Attention *a, Tile *t, const float *k, const float *v, long first) {
    float scores[TALLEST * KEYS], p[KEYS * TALLEST], keep[TALLEST];
    switch (t->rows) {
        case 1: scores_1(t->query, k, a->key_dim, scores); break;
        case 2: scores_2(t->query, k, a->key_dim, scores); break;
        case 3: scores_3(t->query, k, a->key_dim, scores); break;
        case 4: scores_4(t->query, k, a->key_dim, scores); break;
        case 5: scores_5(t->query, k, a->key_dim, scores); break;
        default: scores_6(t->query, k, a->key_dim, scores);
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
        t->rows = height(to - row);
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
        for (int i = 0; i < count; i++) {
            Tile *t = tiles + i;
            if (t->position[t->rows - 1] < block * KEYS) continue;
            if (first_seen(a, t->position[0]) >= (block + 1) * KEYS) continue;
            attend_block(a, t, keys + slot * a->key_dim, values + slot * a->value_dim, block * KEYS);
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

/* ---- norms, activations, rotary embedding ----------------------------------------------------------------------------- */

/* out = weight * x / sqrt(mean(x²) + epsilon) (Zhang and Sennrich, 2019). The squares are summed in 16 chains, and these as a
 * tree. out may be x. */
static void norm_row(const float *x, const float *weight, float *out, long dim, float epsilon) {
    float partial[KEYS] = {0};
    long whole = dim / KEYS * KEYS;
    vf low = ZERO(), high = ZERO();
    for (long i = 0; i < whole; i += KEYS) {
        low = FMA(LOAD(x + i), LOAD(x + i), low);
        if (LANES == 8) high = FMA(LOAD(x + i + KEYS / 2), LOAD(x + i + KEYS / 2), high);
    }
    STORE(partial, low);
    if (LANES == 8) STORE(partial + KEYS / 2, high);
    for (long i = whole; i < dim; i++) partial[i - whole] = __builtin_fmaf(x[i], x[i], partial[i - whole]);
    float scale = 1.0f / __builtin_sqrtf(tree(partial) / (float)dim + epsilon);
    for (long i = 0; i < dim; i++) out[i] = weight[i] * (x[i] * scale);
}

/* x / (1 + exp(-x)) (Elfwing et al., 2017), by exp of numbers up to 0 only. */
INLINE vf silu(vf x) {
    vf e = exponential(MINUS_ABS(x));
    return DIV(NEGATIVE(x, MUL(x, e), x), ADD(e, SET(1.0f)));
}

/* out = silu(x), times `by` if there is one; numbers begin … end - 1. out may be x. */
static void silu_range(const float *x, const float *by, float *out, long begin, long end) {
    long i = begin;
    for (; i + LANES <= end; i += LANES) {
        vf v = silu(LOAD(x + i));
        STORE(out + i, by ? MUL(v, LOAD(by + i)) : v);
    }
    if (i < end) {
        float rest[LANES] = {0};
        memcpy(rest, x + i, (size_t)(end - i) * 4);
        STORE(rest, silu(LOAD(rest)));
        for (long j = 0; i < end; i++, j++) out[i] = by ? rest[j] * by[i] : rest[j];
    }
}

/* Rotary position embedding of one head, in place: its first `dim` numbers, i with i + dim / 2 (Su et al., 2021; the pairing
 * of GPT-NeoX). cos and sin [dim]. Products are rounded before they are added. */
static void rotate(float *restrict x, const float *restrict cos, const float *restrict sin, long dim) {
    long half = dim / 2;
    for (long i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

/* ---- what engine/compute/cpu/kernels.py calls -------------------------------------------------------------------------------------- */

INLINE long panel_width(int kind) { return kind == INT8 ? PANEL8 : PANEL; }
INLINE long panels_of(long columns, int kind) { return (columns + panel_width(kind) - 1) / panel_width(kind); }
INLINE size_t stride_of(int kind, long depth) { return kind == INT8 ? int8_stride(depth) : float_stride(kind, depth); }

/* Lay out a tile's rows for a product, k = from … to - 1. `from` is a multiple of DEEP. */
INLINE void lay_out(const Call *call, long row, int rows, long from, long to) {
    if (call->kind == INT8) quantise_tile(call, row, rows, from, to);
    else if (call->rows > 1) interleave(call, row, rows, from, to); /* one float row is a tile as it stands */
}

/* Units of laying out: DEEP k's of one tile. */
INLINE long pieces_of(const Call *call) { return (call->depth + DEEP - 1) / DEEP; }
INLINE void piece_of(const Call *call, long unit, long *row, int *rows, long *from, long *to) {
    long tile = unit / pieces_of(call);
    *row = tile_start(call->rows, tile), *rows = height(call->rows - *row);
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
    int needed = call->kind == INT8 || call->rows > 1;
    long least = call->rows < TALLEST ? TALLEST / larger(call->rows, 1) : 1;
    return (Phase){lay_out_pieces, call, needed ? tiles_of(call->rows) * pieces_of(call) : 0, least};
}

/* sum = residual + out, for the columns of some panels. */
static void add_residual(const Call *call, long from, long to) {
    long columns = call->matrices->columns, width = panel_width(call->kind);
    long first = from * width, last = to * width < columns ? to * width : columns;
    for (long row = 0; row < call->rows; row++) {
        const float *x = call->residual + row * columns, *y = call->out + row * columns;
        float *sum = call->sum + row * columns;
        for (long i = first; i < last; i++) sum[i] = x[i] + y[i];
    }
}

/* Panels begin … end - 1 of all matrices, one after the other. */
static void multiply(void *of, long begin, long end) {
    const Call *call = of;
    long first = 0;
    float *out = call->out;
    for (long i = 0; i < call->count; i++) {
        const Matrix *m = call->matrices + i;
        long panels = panels_of(m->columns, call->kind);
        long from = begin > first ? begin - first : 0, to = end < first + panels ? end - first : panels;
        if (from < to) {
            if (call->kind == INT8) int8_panels(call, m, out, from, to);
            else if (call->kind == BFLOAT16) float_panels(BFLOAT16, call, m, out, from, to);
            else float_panels(FLOAT32, call, m, out, from, to);
        }
        first += panels;
        out += call->rows * m->columns;
    }
    if (call->sum) add_residual(call, begin, end);
}

static Phase multiplying(Call *call) {
    long least = WORTH / (long)(stride_of(call->kind, call->depth) + 1) / larger(tiles_of(call->rows), 1);
    return (Phase){multiply, call, call->panels, larger(least, 1)};
}

static Call call_of(const float *input, void *scratch, float *out, const Matrix *matrices, long rows, long depth, long count,
                    int kind) {
    long panels = 0;
    for (long i = 0; i < count; i++) panels += panels_of(matrices[i].columns, kind);
    int moved = kind == INT8 || rows > 1;
    return (Call){input, moved ? scratch : (char *)input, out, matrices, rows, depth, count, panels, kind, NULL, NULL};
}

/* Bytes of `linear`'s scratch space for a row. */
long verbatim_scratch(long depth, int kind) { return kind == INT8 ? (long)int8_row(depth) : depth * 4; }

/* Products of one input with several matrices, all of the same kind and depth.
 * input [rows, depth]; scratch: rows · verbatim_scratch bytes; out: one [rows, columns] after the other. */
void verbatim_linear(const float *input, void *scratch, float *out, const Matrix *matrices, long rows, long depth, long count,
                     int kind, int threads) {
    Call call = call_of(input, scratch, out, matrices, rows, depth, count, kind);
    team_run((Phase[]){laying_out(&call), multiplying(&call)}, 2, threads);
}

/* Bytes of a packed matrix. */
long verbatim_packed_bytes(long columns, long depth, int kind) {
    return panels_of(columns, kind) * (long)stride_of(kind, depth);
}

typedef struct {
    const float *weight; /* [columns, depth] */
    char *out;
    long columns, depth;
    int kind;
    _Atomic int lossy;
} Packing;

/* A number's upper half, and whether the lower half held anything. */
INLINE uint32_t narrow(float v, uint32_t *lost) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    *lost |= bits & 0xffff;
    return bits >> 16;
}

static void pack_float(const Packing *p, long panel, uint32_t *lost) {
    long depth = p->depth, deep = (depth + 1) / 2;
    for (int c = 0; c < PANEL; c++) {
        long column = panel * PANEL + c;
        const float *w = p->weight + column * depth;
        uint32_t *out = (uint32_t *)(p->out + panel * float_stride(p->kind, depth)) + c;
        int real = column < p->columns;
        if (p->kind == BFLOAT16)
            for (long i = 0; i < deep; i++) {
                uint32_t low = real ? narrow(w[2 * i], lost) : 0;
                uint32_t high = real && 2 * i + 1 < depth ? narrow(w[2 * i + 1], lost) : 0;
                out[i * PANEL] = low | high << 16;
            }
        else
            for (long k = 0; k < depth; k++) {
                uint32_t bits = 0;
                if (real) memcpy(&bits, w + k, 4);
                out[k * PANEL] = bits;
            }
    }
}

static void pack_int8(const Packing *p, long panel) {
    long depth = p->depth, quads = quads_of(depth);
    char *out = p->out + panel * int8_stride(depth);
    float *scales = (float *)(out + (size_t)quads * ROW_BYTES);
    int32_t *starts = (int32_t *)(scales + groups_of(depth) * PANEL8);
    for (int c = 0; c < PANEL8; c++) {
        long column = panel * PANEL8 + c;
        for (long g = 0; g * GROUP < depth; g++) {
            long live = depth - g * GROUP < GROUP ? depth - g * GROUP : GROUP;
            int32_t bytes[GROUP] = {0}, sum = 0;
            float scale = column < p->columns ? quantise(p->weight + column * depth + g * GROUP, live, bytes) : 0;
            scales[g * PANEL8 + c] = scale;
            for (long i = 0; i < (live + 3) / 4 * 4; i++) {
                out[((g * GROUP_QUADS + i / 4) * PANEL8 + c) * 4 + i % 4] = (char)bytes[i];
                sum += bytes[i];
            }
            if (VNNI) starts[g * PANEL8 + c] = -128 * sum;
        }
    }
}

static void pack_panels(void *data, long begin, long end) {
    Packing *p = data;
    uint32_t lost = 0;
    for (long panel = begin; panel < end && !lost; panel++)
        if (p->kind == INT8) pack_int8(p, panel);
        else pack_float(p, panel, &lost);
    if (lost) atomic_store_explicit(&p->lossy, 1, memory_order_relaxed);
}

/* weight [columns, depth] → packed. Returns 1 if bfloat16 was asked for and would lose something (`out` is then useless). */
int verbatim_pack(const float *weight, void *out, long columns, long depth, int kind, int threads) {
    Packing p = {weight, out, columns, depth, kind, 0};
    team_run(&(Phase){pack_panels, &p, panels_of(columns, kind), 1}, 1, threads);
    return p.lossy;
}

/* What the kernels were compiled for. */
const char *verbatim_target(void) {
#if defined(__AVX512F__)
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
    const float *x, *weight;
    float *out;
    long rows, dim;
    float epsilon;
} Norm;

static void norm_rows(void *norm, long begin, long end) {
    const Norm *n = norm;
    for (long row = begin; row < end; row++)
        norm_row(n->x + row * n->dim, n->weight, n->out + row * n->dim, n->dim, n->epsilon);
}

/* norm_row for every row. x and out [rows, dim], weight [dim]. */
void verbatim_rms_norm(const float *x, const float *weight, float *out, long rows, long dim, float epsilon, int threads) {
    Norm n = {x, weight, out, rows, dim, epsilon};
    team_run(&(Phase){norm_rows, &n, rows, (1 << 14) / dim + 1}, 1, threads);
}

typedef struct {
    const float *x;
    float *out;
    long size;
} Silu;

enum { SILU = 4096 }; /* numbers of a unit */

static void silu_pieces(void *data, long begin, long end) {
    const Silu *a = data;
    silu_range(a->x, NULL, a->out, begin * SILU, end * SILU < a->size ? end * SILU : a->size);
}

/* out = silu(x), both [size]. */
void verbatim_silu(const float *x, float *out, long size, int threads) {
    Silu a = {x, out, size};
    team_run(&(Phase){silu_pieces, &a, (size + SILU - 1) / SILU, 1}, 1, threads);
}

/* Value dimensions have to be a multiple of this. */
int verbatim_lanes(void) { return LANES; }

/* ---- a decoder layer -------------------------------------------------------------------------------------------------- *
 * x + o(attention(rotary(norm(q(n))), rotary(norm(k(n))), v(n))), n = norm(x); then that + down(silu(gate(m)) * up(m)),
 * m = norm of it. All in one call of the team. With one row, only the products and attention are divided. */

/* Layout shared with engine/compute/cpu/kernel_calls.py. */
typedef struct {
    const float *first_norm, *second_norm;     /* [dim] */
    const float *query_norm, *key_norm;        /* [key_dim], or NULL */
    const Matrix *qkv, *o, *gate_up, *down;    /* 3, 1, 2 and 1 */
    const float *sinks;                        /* [heads] or NULL */
    long dim, inner, heads, kv_heads, key_dim, value_dim, rotary, window, chunk;
    int qkv_kind, o_kind, gate_up_kind, down_kind;
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

/* Bytes of a layer's scratch space for a row. */
long verbatim_layer_scratch(const Layer *l) {
    long a = larger(verbatim_scratch(l->dim, l->qkv_kind), verbatim_scratch(l->dim, l->gate_up_kind));
    long b = larger(verbatim_scratch(l->heads * l->value_dim, l->o_kind), verbatim_scratch(l->inner, l->down_kind));
    return 4 * (l->dim + between(l)) + larger(a, b);
}

/* A decoder layer over a step's rows: x, out [rows, dim]; cos, sin [rows, rotary]; scratch: rows * verbatim_layer_scratch
 * bytes. The first `attended` rows have a place in the cache; the others are padding. The rest as in verbatim_attention. */
void verbatim_layer(const Layer *l, const float *x, const float *cos, const float *sin, float *out, float *scratch,
                    float *keys, float *values, const int64_t *slots, uint8_t *finite, Part *parts, long rows, long attended,
                    long cache_slots, long count, int threads) {
    float *normed = scratch, *query = normed + rows * l->dim, *gate = query, *up = gate + rows * l->inner;
    float *key = query + rows * l->heads * l->key_dim, *value = key + rows * l->kv_heads * l->key_dim;
    float *mixed = value + rows * l->kv_heads * l->value_dim, *rest = query + rows * between(l);
    LayerCall c = {
        l, x, cos, sin, out, normed, query, key, value, mixed, gate, up, rows,
        {query, key, value, l->key_dim, l->heads * l->key_dim, l->key_dim, l->kv_heads * l->key_dim, l->value_dim,
         l->kv_heads * l->value_dim, mixed, keys, values, slots, finite, l->sinks, parts, attended, l->heads, l->kv_heads,
         l->key_dim, l->value_dim, cache_slots, count, 0, l->window, l->chunk, l->scale, l->softcap},
        call_of(normed, rest, query, l->qkv, rows, l->dim, 3, l->qkv_kind),
        call_of(mixed, rest, normed, l->o, rows, l->heads * l->value_dim, 1, l->o_kind),
        call_of(normed, rest, gate, l->gate_up, rows, l->dim, 2, l->gate_up_kind),
        call_of(gate, rest, normed, l->down, rows, l->inner, 1, l->down_kind),
    };
    c.o.residual = x, c.o.sum = out;
    c.down.residual = out, c.down.sum = out;
    cut_attention(&c.attention);
    run_layer(&c, threads);
}
