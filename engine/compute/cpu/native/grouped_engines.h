/* A chunk of a panel times ROWS rows, R: included by grouped_products.h for each number of rows. */
#if QUAD_SUMS
#define SUMS(r, c) a##r##c
#else
#define SUMS(r, c) (bits == 5 ? I_ADD32(rest##r##c, I_MADD16(a##r##c, ones)) : I_MADD16(a##r##c, ones))
#endif
#define COLUMN(c) c
/* The empty asm keeps the compiler from holding what it has read of two quads in registers that it does not have. */
#define QUAD_G(j)                                                                                                        \
    { wi w0 = quad_at(bits, w, j), w1 = quad_at(bits, w + vector, j); R(STEP_G, V2) }                                    \
    x += ROWS * 4;                                                                                                       \
    if (ROWS > 2) __asm__ volatile("" ::: "memory");

/* Both vectors of a panel at once: with VNNI, or for 4 and 5 bits. */
INLINE void GLUE(two_vectors_, ROWS)(int bits, const Piece *p) {
    const size_t vector = vector_bytes(bits);
    const wi ones = I_SET16(1);
    const char *x = p->x, *w = p->w, *facts = p->facts;
    for (long step = 0; step < p->steps; step++, w += 2 * vector, facts += FACTS * ROWS * 4) {
        FETCH_AHEAD(2 * vector)
        R(DECLARE_G, V2)
#if !QUAD_SUMS
        R(DECLARE_REST, V2)
#endif
        QUAD_G(0) QUAD_G(1) QUAD_G(2) QUAD_G(3)
        if (p->halves) {
            END_STEP(R, V2, 1)
            R(CLEAR_G, V2)
        }
#if !QUAD_SUMS
        else if (bits == 5) { R(PUT_ASIDE, V2) }
#endif
        QUAD_G(4) QUAD_G(5) QUAD_G(6) QUAD_G(7)
        END_STEP(R, V2, p->halves ? 2 : 0)
    }
    (void)ones;
}

#if !QUAD_SUMS
#undef SUMS
#undef COLUMN
#define COLUMN(c_) c
#define SUMS(r, c_) a##r##0
#define PAIR_G(j)                                                                                                        \
    { wi w0 = quad_at(6, w, j), w1 = quad_at(6, w, j + 1); R(STEP_6, V1) }                                               \
    x += 2 * ROWS * 4;

/* 6 bits: one vector after the other. */
INLINE void GLUE(six_bits_, ROWS)(const Piece *p) {
    const size_t vector = vector_bytes(6);
    const wi ones = I_SET16(1);
    const char *w = p->w, *facts = p->facts, *block = p->x;
    for (long step = 0; step < p->steps; step++, facts += FACTS * ROWS * 4, block += STEP_K * ROWS)
        for (int c = 0; c < 2; c++, w += vector) {
            const char *x = block;
            FETCH_AHEAD(vector)
            R(DECLARE_G, V1)
            PAIR_G(0) PAIR_G(2)
            if (p->halves) {
                END_STEP(R, V1, 1)
                R(CLEAR_G, V1)
            }
            PAIR_G(4) PAIR_G(6)
            END_STEP(R, V1, p->halves ? 2 : 0)
        }
}

#define BYTES_G(j)                                                                                                       \
    { wi number = quad_at(8, w, j), size = I_ABS(number); R(STEP_8, V1) }                                                \
    x += ROWS * 4;

/* 8 bits: one vector after the other. */
INLINE void GLUE(eight_bits_, ROWS)(const Piece *p) {
    const size_t vector = vector_bytes(8);
    const wi ones = I_SET16(1);
    const char *w = p->w, *facts = p->facts, *block = p->x;
    for (long step = 0; step < p->steps; step++, facts += FACTS * ROWS * 4, block += STEP_K * ROWS)
        for (int c = 0; c < 2; c++, w += vector) {
            const char *x = block;
            FETCH_AHEAD(vector)
            R(DECLARE_G, V1)
            BYTES_G(0) BYTES_G(1) BYTES_G(2) BYTES_G(3)
            if (p->halves) {
                END_STEP(R, V1, 1)
                R(CLEAR_G, V1)
            }
            BYTES_G(4) BYTES_G(5) BYTES_G(6) BYTES_G(7)
            END_STEP(R, V1, p->halves ? 2 : 0)
        }
}
#endif

static void GLUE(engine4_, ROWS)(const Piece *p) { GLUE(two_vectors_, ROWS)(4, p); }
static void GLUE(engine5_, ROWS)(const Piece *p) { GLUE(two_vectors_, ROWS)(5, p); }
#if QUAD_SUMS
static void GLUE(engine6_, ROWS)(const Piece *p) { GLUE(two_vectors_, ROWS)(6, p); }
static void GLUE(engine8_, ROWS)(const Piece *p) { GLUE(two_vectors_, ROWS)(8, p); }
#else
static void GLUE(engine6_, ROWS)(const Piece *p) { GLUE(six_bits_, ROWS)(p); }
static void GLUE(engine8_, ROWS)(const Piece *p) { GLUE(eight_bits_, ROWS)(p); }
#endif
static const Engine GLUE(engines_, ROWS)[ENGINES] = {GLUE(engine4_, ROWS), GLUE(engine5_, ROWS), GLUE(engine6_, ROWS),
                                                    GLUE(engine8_, ROWS)};
#undef SUMS
#undef COLUMN
#undef QUAD_G
#undef PAIR_G
#undef BYTES_G
#undef ROWS
#undef R
