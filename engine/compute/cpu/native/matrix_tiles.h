/* A processor's matrix unit, AMX-INT8: eight tiles of up to 16 rows of 64 bytes; one instruction multiplies two of them. Knows tiles;
 * nothing of weights.
 *
 * TILE_LOAD(t, p, stride), TILE_STORE: rows that lie `stride` bytes apart, of the shape that tile t has. TILE_ZERO(t).
 * TILE_ADD_SS(c, a, b): c[m][n] += sum over k of a[m][k] · b[k / 4][n][k % 4], int32 and bytes with a sign. So b holds a quad of
 * each column beside that of the next, as panels of weights do. TILE_ADD_SU: the bytes of b have no sign. Sums are exact.
 * t, c, a and b are numbers, written out.
 *
 * Between tiles_begin, which gives all tiles their shapes and clears them, and tiles_end, by the same thread. What lies between keeps
 * no tile from one call to the next, so that a thread that has left can be put aside by the system at no more cost than before.
 *
 * A program must have asked Linux for the tiles' memory before it touches one (`ask_for_tiles`); otherwise it is ended by a signal.
 * Some virtual machines announce the unit and trap on it: so nothing here is used before a child process has tried it
 * (engine/compute/cpu/matrix_unit.py). */
#pragma once
#include <errno.h>
#include "vectors.h"

/* With VERBATIM_EMULATE_MATRIX, for tests, the instructions are written out, and they trap where a processor would. Its value is
 * computed, too, with each of its products: a test may make them hang, crash or be wrong. */
#if defined(VERBATIM_EMULATE_MATRIX)
#define MATRIX_UNIT 1
#elif defined(__AMX_INT8__) && defined(__AMX_TILE__) && defined(__linux__) && !defined(VERBATIM_NO_MATRIX_UNIT)
#define MATRIX_UNIT 1
#else
#define MATRIX_UNIT 0
#endif

#if MATRIX_UNIT
#define TILE_ROWS 16  /* at most */
#define TILE_BYTES 64 /* of a row at most: 16 sums, or 64 numbers of 8 bits */

/* What LDTILECFG reads (Intel's manual, "palette 1"). A tile with 0 rows cannot be used. */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16]; /* of a tile's row */
    uint8_t rows[16];
} TileShapes;
_Static_assert(sizeof(TileShapes) == 64, "LDTILECFG reads 64 bytes");

INLINE void shape_tile(TileShapes *shapes, int tile, int rows, int bytes) {
    shapes->palette = 1;
    shapes->rows[tile] = (uint8_t)rows, shapes->bytes[tile] = (uint16_t)bytes;
}

#if defined(VERBATIM_EMULATE_MATRIX)
static _Thread_local struct {
    TileShapes shapes;
    uint8_t tiles[8][TILE_ROWS][TILE_BYTES];
} unit;

INLINE void trap_unless(int right) {
    if (!right) __builtin_trap();
}

static void tiles_begin(const TileShapes *shapes) {
    trap_unless(shapes->palette == 1 && shapes->start_row == 0);
    for (int t = 0; t < 16; t++) {
        trap_unless(shapes->rows[t] <= TILE_ROWS && shapes->bytes[t] <= TILE_BYTES && !shapes->rows[t] == !shapes->bytes[t]);
        trap_unless(t < 8 || !shapes->rows[t]);
    }
    unit.shapes = *shapes;
    memset(unit.tiles, 0, sizeof unit.tiles);
}

static void tiles_end(void) { memset(&unit, 0, sizeof unit); }

/* Whether a tile can be used, and its rows. */
INLINE int tile_rows(int t) {
    trap_unless(t >= 0 && t < 8 && unit.shapes.palette == 1 && unit.shapes.rows[t] > 0);
    return unit.shapes.rows[t];
}

static void tile_zero(int t) {
    tile_rows(t);
    memset(unit.tiles[t], 0, sizeof unit.tiles[t]);
}

static void tile_load(int t, const void *p, long stride) {
    tile_zero(t);
    for (int r = 0; r < tile_rows(t); r++) memcpy(unit.tiles[t][r], (const char *)p + r * stride, unit.shapes.bytes[t]);
}

static void tile_store(int t, void *p, long stride) {
    for (int r = 0; r < tile_rows(t); r++) memcpy((char *)p + r * stride, unit.tiles[t][r], unit.shapes.bytes[t]);
}

static void tile_add(int c, int a, int b, int with_sign) {
    const TileShapes *s = &unit.shapes;
    trap_unless(c != a && a != b && c != b);
    trap_unless(tile_rows(c) == tile_rows(a) && s->bytes[c] == s->bytes[b] && s->bytes[a] == 4 * tile_rows(b));
    trap_unless(s->bytes[c] % 4 == 0 && s->bytes[a] % 4 == 0);
    for (int m = 0; m < s->rows[c]; m++)
        for (int n = 0; n < s->bytes[c] / 4; n++) {
            int32_t sum;
            memcpy(&sum, unit.tiles[c][m] + 4 * n, 4);
            for (int k = 0; k < s->bytes[a]; k++) {
                uint8_t w = unit.tiles[b][k / 4][4 * n + k % 4];
                sum += (int8_t)unit.tiles[a][m][k] * (with_sign ? (int8_t)w : w);
            }
            memcpy(unit.tiles[c][m] + 4 * n, &sum, 4);
        }
    (void)(VERBATIM_EMULATE_MATRIX);
}

#define TILE_ZERO(t) tile_zero(t)
#define TILE_LOAD(t, p, stride) tile_load(t, p, stride)
#define TILE_STORE(t, p, stride) tile_store(t, p, stride)
#define TILE_ADD_SS(c, a, b) tile_add(c, a, b, 1)
#define TILE_ADD_SU(c, a, b) tile_add(c, a, b, 0)
static int ask_for_tiles(void) { return 0; }

#else
#include <sys/syscall.h>
#include <unistd.h>

/* gcc's intrinsics do not say that a load reads memory: what is to be loaded has to be written before. */
#define WRITTEN() __asm__ volatile("" ::: "memory")
INLINE void tiles_begin(const TileShapes *shapes) {
    WRITTEN();
    _tile_loadconfig(shapes);
}
INLINE void tiles_end(void) { _tile_release(); }
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, p, stride) do { WRITTEN(); _tile_loadd(t, p, stride); } while (0)
#define TILE_STORE(t, p, stride) _tile_stored(t, p, stride)
#define TILE_ADD_SS(c, a, b) _tile_dpbssd(c, a, b)
#define TILE_ADD_SU(c, a, b) _tile_dpbsud(c, a, b)

/* For all threads of this process, those to come too. Returns an errno. */
static int ask_for_tiles(void) {
    enum { ASK = 0x1023, TILES = 18 }; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA: asm/prctl.h, since Linux 5.16 */
    return syscall(SYS_arch_prctl, ASK, TILES) ? errno : 0;
}
#endif
#endif

/* Whether products of many rows use the unit: see verbatim_matrix_unit. */
static _Atomic int matrix_unit;
