/* Few rows times a dense matrix in half precision, read as it is stored: y = x w' + bias, all else in float32. For all in
   bfloat16 see pairs.c, and unit.c for processors with a matrix unit. */

#include "wide.h"

/* Numbers at once; outputs ahead of which memory is fetched; rows above which a product is one with panels. */
enum { STEP = 2 * WIDE, AHEAD = 8, FEW_DENSE = 16 };

/* Rows and outputs whose sums are kept at once: as many as there are registers for, so that what is loaded is used several
   times, a row's numbers for some outputs, an output's for some rows. */
#ifdef __AVX512F__
enum { ROWS_AT_ONCE = 4, OUTPUTS_AT_ONCE = 4 };
#else
enum { ROWS_AT_ONCE = 4, OUTPUTS_AT_ONCE = 2 };
#endif

typedef uint32_t loose_pairs __attribute__((vector_size(4 * WIDE), aligned(2)));

/* One step of a matrix's numbers as floats: those at even places, then those at odd ones. */
INLINE void load_step(const uint16_t *w, int kind, wide *even, wide *odd) {
    const wide_ints both = (wide_ints)*(const loose_pairs *)w;
    if (kind == BFLOAT16) {
        *even = (wide)(both << 16);
        *odd = (wide)(both & (int32_t)0xffff0000);
        return;
    }
    const wide_ints low = both & 0x7fff, high = both >> 16 & 0x7fff;
    const wide scale = (wide){0} + 0x1p112f;
    const wide_ints low_sign = (both & 0x8000) << 16, high_sign = both & (int32_t)0x80000000;
    *even = (wide)((wide_ints)((wide)(low << 13) * scale) | ((low >= 0x7c00) & 0x7f800000) | low_sign);
    *odd = (wide)((wide_ints)((wide)(high << 13) * scale) | ((high >= 0x7c00) & 0x7f800000) | high_sign);
}

/* Products of `rows` rows with the weights of `outputs` outputs; of every step of x even places stand first. */
INLINE void dense_tile(const uint16_t *w, const float *x, int64_t inputs, int rows, int outputs, int kind,
                       float y[ROWS_AT_ONCE][OUTPUTS_AT_ONCE]) {
    wide sum[ROWS_AT_ONCE][OUTPUTS_AT_ONCE] = {{{0}}};
    int64_t i = 0;
    for (; i + STEP <= inputs; i += STEP) {
        wide even[OUTPUTS_AT_ONCE], odd[OUTPUTS_AT_ONCE];
#pragma GCC unroll 4
        for (int o = 0; o < outputs; o++) {
            __builtin_prefetch(w + (AHEAD + o) * inputs + i, 0, 2); /* into the second cache, as in pairs.c */
            load_step(w + o * inputs + i, kind, &even[o], &odd[o]);
        }
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) {
            wide a, b;
            memcpy(&a, x + m * inputs + i, sizeof a);
            memcpy(&b, x + m * inputs + i + WIDE, sizeof b);
#pragma GCC unroll 4
            for (int o = 0; o < outputs; o++) sum[m][o] = plus_wide(sum[m][o], a, even[o]);
#pragma GCC unroll 4
            for (int o = 0; o < outputs; o++) sum[m][o] = plus_wide(sum[m][o], b, odd[o]);
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int o = 0; o < outputs; o++) {
            y[m][o] = sum_of_wide(sum[m][o]);
            for (int64_t j = i; j < inputs; j++) y[m][o] += x[m * inputs + j] * half_value(w[o * inputs + j], kind);
        }
}

INLINE void dense_rows(const uint16_t *w, const float *x, int64_t inputs, int rows, int outputs, int kind,
                       float y[ROWS_AT_ONCE][OUTPUTS_AT_ONCE]) {
    if (rows == 1) dense_tile(w, x, inputs, 1, outputs, kind, y);
    else if (rows == 2) dense_tile(w, x, inputs, 2, outputs, kind, y);
    else if (rows == 3) dense_tile(w, x, inputs, 3, outputs, kind, y);
    else dense_tile(w, x, inputs, ROWS_AT_ONCE, outputs, kind, y);
}

INLINE void dense_outputs(const uint16_t *w, const float *x, int64_t inputs, int rows, int outputs, int kind,
                          float y[ROWS_AT_ONCE][OUTPUTS_AT_ONCE]) {
    if (outputs == OUTPUTS_AT_ONCE) dense_rows(w, x, inputs, rows, OUTPUTS_AT_ONCE, kind, y);
    else
        for (int o = 0; o < outputs; o++)
            dense_rows(w + o * inputs, x, inputs, rows, 1, kind, (float(*)[OUTPUTS_AT_ONCE])(y[0] + o));
}

/* x with, of every step, the numbers at even places first; to be freed. NULL where memory ran out. */
static float *sorted_steps(const float *x, int64_t rows, int64_t inputs) {
    float *sorted = aligned_alloc(LINE, lines(rows * inputs * sizeof *sorted));
    for (int64_t m = 0; sorted && m < rows; m++) {
        const float *from = x + m * inputs;
        float *to = sorted + m * inputs;
        int64_t i = 0;
        for (; i + STEP <= inputs; i += STEP)
            for (int j = 0; j < STEP; j++) to[i + j / 2 + (j & 1) * WIDE] = from[i + j];
        for (; i < inputs; i++) to[i] = from[i];
    }
    return sorted;
}

/* x [rows, inputs], y [rows, outputs] with rows `stride` apart: float32, or bfloat16 where `half`, where it
   `multiplies_pairs` or `unit_multiplies`; bias float32. A row's numbers depend on how many rows there are only in whether
   these are few, and in bfloat16 not at all. Gives 0, or 1 where memory ran out. */
int dense_product(const Matrix *matrix, const void *x, int64_t rows, const float *bias, void *y, int64_t stride, int half,
                  int threads) {
    const int64_t outputs = matrix->outputs, inputs = matrix->inputs;
    const uint16_t *w = (const uint16_t *)matrix->codes;
    if (half && unit_multiplies(outputs, inputs))
        return unit_product(&(Joined){{matrix}, {bias}}, x, rows, y, stride, threads);
    if (half) return pairs_product(matrix, x, rows, bias, y, stride, threads);
    if (rows > FEW_DENSE) return panel_product(matrix, x, rows, bias, y, stride, threads);
    float *sorted = sorted_steps(x, rows, inputs);
    if (!sorted) return 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t o = 0; o < outputs; o += OUTPUTS_AT_ONCE)
        for (int64_t m = 0; m < rows; m += ROWS_AT_ONCE) {
            const int some = rows - m < ROWS_AT_ONCE ? (int)(rows - m) : ROWS_AT_ONCE;
            const int here = outputs - o < OUTPUTS_AT_ONCE ? (int)(outputs - o) : OUTPUTS_AT_ONCE;
            float of[ROWS_AT_ONCE][OUTPUTS_AT_ONCE];
            const uint16_t *from = w + o * inputs;
            if (matrix->kind == BFLOAT16)
                dense_outputs(from, sorted + m * inputs, inputs, some, here, BFLOAT16, of);
            else dense_outputs(from, sorted + m * inputs, inputs, some, here, FLOAT16, of);
            for (int r = 0; r < some; r++)
                for (int j = 0; j < here; j++) ((float *)y)[(m + r) * stride + o + j] = of[r][j] + (bias ? bias[o + j] : 0);
        }
    free(sorted);
    return 0;
}
