/* Products in bfloat16 by the matrix unit of a processor (AMX), for any number of rows. It multiplies a tile of sixteen rows
   of 32 inputs, as they are stored, with a tile of sixteen columns, which is turned over first: sixteen pairs of inputs
   with sixteen columns. The rows are those of the matrix, read as it is stored; those of x are turned over, once for all
   outputs. Sums are in float32, each made in the same order however many rows of x there are. */

#include "half.h"

#ifdef MATRIX_UNIT

#include <sys/syscall.h>
#include <unistd.h>

/* Outputs and rows of x whose sums are made at once; bytes of x that meet all outputs before the next, as many as stay
   near. */
enum { TWICE = 2 * SIDE, PANEL = 1 << 20 };

/* Whether the system lets this process use the unit, and the sizes are whole tiles. */
int unit_multiplies(int64_t outputs, int64_t inputs) {
    static int allowed = -1;
    enum { ASK_FOR_STATE = 0x1023, TILE_DATA = 18 };
    if (allowed < 0) allowed = syscall(SYS_arch_prctl, ASK_FOR_STATE, TILE_DATA) == 0;
    return allowed && outputs >= SIDE && inputs % DEEP == 0;
}

/* Sums of two tiles of rows with one or two of columns. A tile of rows lies DEEP numbers behind the one before it, its
   rows `apart`, those of the second tile `below` the first; tiles of columns lie one behind the other. At each step `lines`
   of memory from `next` on are fetched: no hardware looks beyond a page. */
INLINE void sums_of(const bf16 *rows, int64_t below, int64_t apart, const bf16 *columns, int64_t steps, int tiles,
                    const char *next, int64_t lines, float sums[4][SIDE * SIDE]) {
    settle();
    _tile_zero(0);
    _tile_zero(2);
    if (tiles > 1) {
        _tile_zero(1);
        _tile_zero(3);
    }
    for (int64_t i = 0; i < steps; i++) {
        _tile_loadd(4, rows + i * DEEP, apart * 2);
        _tile_loadd(5, rows + below + i * DEEP, apart * 2);
        _tile_loadd(6, columns + i * NUMBERS, ACROSS);
        if (tiles > 1) _tile_loadd(7, columns + (steps + i) * NUMBERS, ACROSS);
        for (int64_t j = 0; j < lines; j++) __builtin_prefetch(next + (i * lines + j) * LINE);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        if (tiles > 1) {
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums[0], ACROSS);
    _tile_stored(2, sums[2], ACROSS);
    if (tiles > 1) {
        _tile_stored(1, sums[1], ACROSS);
        _tile_stored(3, sums[3], ACROSS);
    }
}

/* Two tiles of outputs of a matrix, which go to places `to` of a row. Near the end a tile starts earlier than it should, so
   that it is whole; its outputs from `skip` on are new, and `tiles` is 1 where the second has none. */
typedef struct {
    const Matrix *matrix;
    const float *bias[2];
    int64_t at[2], to[2];
    int skip[2], tiles;
} Outputs;

static Outputs outputs_from(const Matrix *matrix, const float *bias, int64_t o, int64_t before) {
    Outputs found = {.matrix = matrix, .at = {o, o + SIDE}, .tiles = o + SIDE < matrix->outputs ? 2 : 1};
    for (int t = 0; t < 2; t++) {
        const int64_t last = matrix->outputs - SIDE, over = found.at[t] > last ? found.at[t] - last : 0;
        found.at[t] -= over, found.skip[t] = (int)over, found.to[t] = before + found.at[t];
        found.bias[t] = bias ? bias + found.at[t] : NULL;
    }
    return found;
}

/* Sixteen outputs of one row, those from `skip` on. */
INLINE void put_outputs(__m512 sums, const float *bias, int skip, bf16 *y) {
    const __mmask16 which = (__mmask16)(0xffff << skip);
    if (bias) sums = _mm512_add_ps(sums, _mm512_maskz_loadu_ps(which, bias));
    _mm256_mask_storeu_epi16(y, which, (__m256i)_mm512_cvtneps_pbh(sums));
}

/* Outputs of `rows` rows of x, which are turned over in `columns`. The outputs after them are fetched on the way. */
static void outputs_of_rows(const Outputs *o, const bf16 *columns, int64_t rows, bf16 *y, int64_t stride) {
    const int64_t inputs = o->matrix->inputs, steps = inputs / DEEP, below = (o->at[1] - o->at[0]) * inputs;
    const bf16 *w = (const bf16 *)o->matrix->codes + o->at[0] * inputs, *from[SIDE];
    const char *next = (const char *)(w + TWICE * inputs);
    float sums[4][SIDE * SIDE] __attribute__((aligned(LINE)));
    for (int64_t m = 0; m < rows; m += TWICE) {
        const int64_t lines = m ? 0 : TWICE;
        if (rows - m > SIDE) sums_of(w, below, inputs, columns + m * inputs, steps, 2, next, lines, sums);
        else sums_of(w, below, inputs, columns + m * inputs, steps, 1, next, lines, sums);
        for (int t = 0; t < o->tiles; t++)
            for (int64_t first = m; first < rows && first < m + TWICE; first += SIDE) {
                __m512i turned[SIDE];
                for (int i = 0; i < SIDE; i++) from[i] = (const bf16 *)(sums[2 * t + (first > m)] + i * SIDE);
                turned_over(from, 0, turned);
                for (int i = 0; i < SIDE && first + i < rows; i++)
                    put_outputs((__m512)turned[i], o->bias[t], o->skip[t], y + (first + i) * stride + o->to[t]);
            }
    }
}

INLINE int64_t blocks_of(const Matrix *w) { return (w->outputs + TWICE - 1) / TWICE; }

/* Block `b` of those of all matrices one behind the other. */
static Outputs block_of(const Joined *w, int64_t b) {
    int64_t before = 0;
    int part = 0;
    for (; b >= blocks_of(w->parts[part]); part++) b -= blocks_of(w->parts[part]), before += w->parts[part]->outputs;
    return outputs_from(w->parts[part], w->bias[part], b * TWICE, before);
}

/* Matrices that read the same x [rows, inputs], their outputs side by side in y, whose rows lie `stride` apart. Gives 0,
   or 1 where memory ran out. */
int unit_product(const Joined *w, const bf16 *x, int64_t rows, bf16 *y, int64_t stride, int threads) {
    const int64_t inputs = w->parts[0]->inputs, near = PANEL / (int64_t)sizeof *x / inputs / TWICE * TWICE;
    const int64_t all = (rows + SIDE - 1) / SIDE * SIDE, most = near > TWICE ? near : TWICE, panel = all < most ? all : most;
    int64_t blocks = 0;
    for (int i = 0; i < 3 && w->parts[i]; i++) blocks += blocks_of(w->parts[i]);
    bf16 *columns = aligned_alloc(LINE, panel * inputs * sizeof *columns);
    if (!columns) return 1;
#pragma omp parallel num_threads(threads)
    {
        _tile_loadconfig(&WHOLE);
        for (int64_t from = 0; from < rows; from += panel) {
            const int64_t here = rows - from < panel ? rows - from : panel;
#pragma omp for schedule(static)
            for (int64_t m = 0; m < here; m += SIDE)
                turn_rows(x + (from + m) * inputs, inputs, here - m, inputs, columns + m * inputs);
#pragma omp for schedule(static)
            for (int64_t b = 0; b < blocks; b++) {
                const Outputs some = block_of(w, b);
                outputs_of_rows(&some, columns, here, y + from * stride, stride);
            }
        }
        _tile_release();
    }
    free(columns);
    return 0;
}

#else

int unit_multiplies(int64_t outputs, int64_t inputs) { return 0 * (outputs + inputs); }

int unit_product(const Joined *w, const bf16 *x, int64_t rows, bf16 *y, int64_t stride, int threads) {
    (void)w, (void)x, (void)rows, (void)y, (void)stride;
    return threads;
}

#endif
