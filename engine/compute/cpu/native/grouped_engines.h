/* A chunk of a panel times ROWS rows, R: included by grouped_products.h for each number of rows. */
#if QUAD_SUMS
#define SUMS(r, c) a##r##c
#else
#define SUMS(r, c) (bits == 5 ? I_ADD32(rest##r##c, I_MADD16(a##r##c, ones)) : I_MADD16(a##r##c, ones))
#endif
#if ROWS <= 2
#define TOTAL(r, c) t##r##c
#define SET_TOTAL(r, c, v) t##r##c = v
#define BEGIN_TOTALS R(LOAD_TOTAL, V2)
#define END_TOTALS R(STORE_TOTAL, V2)
#else
#define TOTAL(r, c) F_LOAD(TOTAL_AT(r, c))
#define SET_TOTAL(r, c, v) F_STORE(TOTAL_AT(r, c), v)
#define BEGIN_TOTALS
#define END_TOTALS
#endif
/* The empty asm keeps the compiler from holding what it has read of two quads in registers that it does not have. */
#define QUAD_G(j)                                                                                                        \
    { wi w0 = quad_at(bits, w, j), w1 = quad_at(bits, w + vector, j); R(STEP_G, V2) }                                    \
    x += ROWS * 4;                                                                                                       \
    if (ROWS > 2) __asm__ volatile("" ::: "memory");

/* Both vectors of a panel at once: with VNNI, or for 4 and 5 bits. */
INLINE void GLUE(two_vectors_, ROWS)(int bits, const Piece *p) {
    const size_t vector = vector_bytes(bits);
    const wi ones = I_SET16(1);
    const Decoded *const decoded = p->decoded;
    const int halves = p->halves, zeros = p->zeros, minima = p->minima;
    const char *x = p->x, *w = p->w, *facts = p->facts;
    BEGIN_TOTALS
    for (long step = 0; step < p->steps; step++, w += 2 * vector, facts += FACTS * ROWS * 4) {
        FETCH_AHEAD(2 * vector)
        R(DECLARE_G, V2)
#if !QUAD_SUMS
        R(DECLARE_REST, V2)
#endif
        QUAD_G(0) QUAD_G(1) QUAD_G(2) QUAD_G(3)
        if (halves) {
            END_STEP(R, V2, 1)
            R(CLEAR_G, V2)
        }
#if !QUAD_SUMS
        else if (bits == 5) { R(PUT_ASIDE, V2) }
#endif
        QUAD_G(4) QUAD_G(5) QUAD_G(6) QUAD_G(7)
        END_STEP(R, V2, halves ? 2 : 0)
    }
    END_TOTALS
    (void)ones;
}

#if !QUAD_SUMS
#undef SUMS
#define SUMS(r, c) a##r##c
#define PAIR_G(V, j)                                                                                                     \
    { wi w0 = quad_at(6, w, j), w1 = quad_at(6, w, j + 1); R(STEP_6, V) }                                                \
    x += 2 * ROWS * 4;
#define BYTES_G(V, j)                                                                                                    \
    { wi number = quad_at(8, w, j), size = I_ABS(number); R(STEP_8, V) }                                                 \
    x += ROWS * 4;
#define PAIRS_LOW(V) PAIR_G(V, 0) PAIR_G(V, 2)
#define PAIRS_HIGH(V) PAIR_G(V, 4) PAIR_G(V, 6)
#define BYTES_LOW(V) BYTES_G(V, 0) BYTES_G(V, 1) BYTES_G(V, 2) BYTES_G(V, 3)
#define BYTES_HIGH(V) BYTES_G(V, 4) BYTES_G(V, 5) BYTES_G(V, 6) BYTES_G(V, 7)
/* A block of one vector. */
#define VECTOR_G(V, LOW, HIGH)                                                                                           \
    {                                                                                                                    \
        const char *x = block;                                                                                           \
        FETCH_AHEAD(vector)                                                                                              \
        R(DECLARE_G, V)                                                                                                  \
        LOW(V)                                                                                                           \
        if (halves) {                                                                                                    \
            END_STEP(R, V, 1)                                                                                            \
            R(CLEAR_G, V)                                                                                                \
        }                                                                                                                \
        HIGH(V)                                                                                                          \
        END_STEP(R, V, halves ? 2 : 0)                                                                                   \
        w += vector;                                                                                                     \
    }
/* 6 or 8 bits: one vector after the other. */
#define VECTORS_G(name, bits, LOW, HIGH)                                                                                 \
    static void GLUE(name, ROWS)(const Piece *p) {                                                                       \
        const size_t vector = vector_bytes(bits);                                                                        \
        const wi ones = I_SET16(1);                                                                                      \
        const Decoded *const decoded = p->decoded;                                                                       \
        const int halves = p->halves, zeros = p->zeros, minima = p->minima;                                              \
        const char *w = p->w, *facts = p->facts, *block = p->x;                                                          \
        BEGIN_TOTALS                                                                                                     \
        for (long step = 0; step < p->steps; step++, facts += FACTS * ROWS * 4, block += STEP_K * ROWS) {                \
            VECTOR_G(FIRST, LOW, HIGH)                                                                                   \
            VECTOR_G(SECOND, LOW, HIGH)                                                                                  \
        }                                                                                                                \
        END_TOTALS                                                                                                       \
    }
VECTORS_G(engine6_, 6, PAIRS_LOW, PAIRS_HIGH)
VECTORS_G(engine8_, 8, BYTES_LOW, BYTES_HIGH)
#else
static void GLUE(engine6_, ROWS)(const Piece *p) { GLUE(two_vectors_, ROWS)(6, p); }
static void GLUE(engine8_, ROWS)(const Piece *p) { GLUE(two_vectors_, ROWS)(8, p); }
#endif
static void GLUE(engine4_, ROWS)(const Piece *p) { GLUE(two_vectors_, ROWS)(4, p); }
static void GLUE(engine5_, ROWS)(const Piece *p) { GLUE(two_vectors_, ROWS)(5, p); }
static const Engine GLUE(engines_, ROWS)[ENGINES] = {GLUE(engine4_, ROWS), GLUE(engine5_, ROWS), GLUE(engine6_, ROWS),
                                                    GLUE(engine8_, ROWS)};
#undef SUMS
#undef TOTAL
#undef SET_TOTAL
#undef BEGIN_TOTALS
#undef END_TOTALS
#undef QUAD_G
#undef PAIR_G
#undef BYTES_G
#undef PAIRS_LOW
#undef PAIRS_HIGH
#undef BYTES_LOW
#undef BYTES_HIGH
#undef VECTOR_G
#undef VECTORS_G
#undef ROWS
#undef R
