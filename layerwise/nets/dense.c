/* Few rows times a dense matrix in half precision, read as it is stored: y = x w' + bias, all else in float32. */

#include "native.h"

typedef uint32_t loose_pairs __attribute__((vector_size(32), aligned(2)));

enum { STEP = 2 * MANY, ROWS_AT_ONCE = 4 };

#ifdef __FMA__
INLINE many plus_product(many sum, many a, many b) { return (many)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum); }
#else
INLINE many plus_product(many sum, many a, many b) { return sum + a * b; }
#endif

/* The number that 16 bits stand for, exactly. */
INLINE float half_value(uint16_t bits, int kind) {
    if (kind == BFLOAT16) return widened(bits);
    const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = bits & 0x7fff;
    uint32_t wide = rest >= 0x7c00 ? 0x7f800000 | rest << 13 : rest << 13;
    float value;
    memcpy(&value, &wide, 4);
    if (rest < 0x7c00) value *= 0x1p112f; /* the exponent's other bias; numbers below the normal ones come right too */
    memcpy(&wide, &value, 4);
    wide |= sign;
    memcpy(&value, &wide, 4);
    return value;
}

/* Sixteen numbers of a matrix as floats: those at even places, then those at odd ones. */
INLINE void load_step(const uint16_t *w, int kind, many *even, many *odd) {
    const many_ints both = (many_ints)*(const loose_pairs *)w;
    if (kind == BFLOAT16) {
        *even = (many)(both << 16);
        *odd = (many)(both & (int32_t)0xffff0000);
        return;
    }
    const many_ints low = both & 0x7fff, high = both >> 16 & 0x7fff;
    const many scale = (many){0} + 0x1p112f;
    const many_ints low_sign = (both & 0x8000) << 16, high_sign = both & (int32_t)0x80000000;
    *even = (many)((many_ints)((many)(low << 13) * scale) | ((low >= 0x7c00) & 0x7f800000) | low_sign);
    *odd = (many)((many_ints)((many)(high << 13) * scale) | ((high >= 0x7c00) & 0x7f800000) | high_sign);
}

/* Products of `rows` rows, `inputs` apart, with one output's weights; of every step of x even places stand first. */
INLINE void dense_output(const uint16_t *w, const float *x, int64_t inputs, int rows, int kind, float *y) {
    many sum[ROWS_AT_ONCE][2] = {{{0}}};
    int64_t i = 0;
    for (; i + STEP <= inputs; i += STEP) {
        many even, odd;
        load_step(w + i, kind, &even, &odd);
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) {
            many a, b;
            memcpy(&a, x + m * inputs + i, sizeof a);
            memcpy(&b, x + m * inputs + i + MANY, sizeof b);
            sum[m][0] = plus_product(sum[m][0], a, even);
            sum[m][1] = plus_product(sum[m][1], b, odd);
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++) {
        y[m] = sum_of_many(sum[m][0] + sum[m][1]);
        for (int64_t j = i; j < inputs; j++) y[m] += x[m * inputs + j] * half_value(w[j], kind);
    }
}

INLINE void dense_rows(const uint16_t *w, const float *x, int64_t inputs, int rows, int kind, float *y) {
    if (rows == 1) dense_output(w, x, inputs, 1, kind, y);
    else if (rows == 2) dense_output(w, x, inputs, 2, kind, y);
    else if (rows == 3) dense_output(w, x, inputs, 3, kind, y);
    else dense_output(w, x, inputs, 4, kind, y);
}

/* x [rows, inputs], y [rows, outputs] with rows `stride` apart, and bias are float32. A row's numbers do not depend on
   how many rows there are. Gives 0, or 1 where memory ran out. */
int dense_product(const Matrix *matrix, const float *x, int64_t rows, const float *bias, float *y, int64_t stride,
                  int threads) {
    const int64_t outputs = matrix->outputs, inputs = matrix->inputs;
    const uint16_t *w = (const uint16_t *)matrix->codes;
    float *sorted = aligned_alloc(LINE, lines(rows * inputs * sizeof *sorted));
    if (!sorted) return 1;
    for (int64_t m = 0; m < rows; m++) {
        const float *from = x + m * inputs;
        float *to = sorted + m * inputs;
        int64_t i = 0;
        for (; i + STEP <= inputs; i += STEP)
            for (int j = 0; j < STEP; j++) to[i + j / 2 + (j & 1) * MANY] = from[i + j];
        for (; i < inputs; i++) to[i] = from[i];
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t o = 0; o < outputs; o++)
        for (int64_t m = 0; m < rows; m += ROWS_AT_ONCE) {
            const int some = rows - m < ROWS_AT_ONCE ? (int)(rows - m) : ROWS_AT_ONCE;
            float of_rows[ROWS_AT_ONCE];
            const float *in = sorted + m * inputs;
            if (matrix->kind == BFLOAT16) dense_rows(w + o * inputs, in, inputs, some, BFLOAT16, of_rows);
            else dense_rows(w + o * inputs, in, inputs, some, FLOAT16, of_rows);
            for (int r = 0; r < some; r++) y[(m + r) * stride + o] = of_rows[r] + (bias ? bias[o] : 0);
        }
    free(sorted);
    return 0;
}
