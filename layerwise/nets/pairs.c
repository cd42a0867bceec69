/* Few rows times a dense matrix, both in bfloat16, for processors that multiply pairs of it: y = x w' + bias. Sums are in
   float32. The matrix is read as it is stored. */

#include "native.h"

#ifdef __AVX512BF16__

/* Numbers of a vector; outputs and rows whose sums are kept at once. */
enum { NUMBERS = 32, OUTPUTS_AT_ONCE = 4, ROWS_AT_ONCE = 4 };

INLINE __m512bh numbers(const bf16 *from, __mmask32 which) { return (__m512bh)_mm512_maskz_loadu_epi16(which, from); }

INLINE void pairs_tile(const bf16 *w, const bf16 *x, int64_t inputs, int rows, int outputs,
                       float y[ROWS_AT_ONCE][OUTPUTS_AT_ONCE]) {
    __m512 sum[ROWS_AT_ONCE][OUTPUTS_AT_ONCE];
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int o = 0; o < outputs; o++) sum[m][o] = _mm512_setzero_ps();
    for (int64_t i = 0; i < inputs; i += NUMBERS) {
        const __mmask32 which = inputs - i < NUMBERS ? (1u << (inputs - i)) - 1 : 0xffffffff;
        __m512bh weights[OUTPUTS_AT_ONCE];
#pragma GCC unroll 4
        for (int o = 0; o < outputs; o++) {
            __builtin_prefetch(w + (outputs + o) * inputs + i); /* the next tile: no hardware looks beyond a page */
            weights[o] = numbers(w + o * inputs + i, which);
        }
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) {
            const __m512bh some = numbers(x + m * inputs + i, which);
#pragma GCC unroll 4
            for (int o = 0; o < outputs; o++) sum[m][o] = _mm512_dpbf16_ps(sum[m][o], some, weights[o]);
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int o = 0; o < outputs; o++) y[m][o] = _mm512_reduce_add_ps(sum[m][o]);
}

INLINE void pairs_rows(const bf16 *w, const bf16 *x, int64_t inputs, int rows, int outputs,
                       float y[ROWS_AT_ONCE][OUTPUTS_AT_ONCE]) {
    if (rows == 1) pairs_tile(w, x, inputs, 1, outputs, y);
    else if (rows == 2) pairs_tile(w, x, inputs, 2, outputs, y);
    else if (rows == 3) pairs_tile(w, x, inputs, 3, outputs, y);
    else pairs_tile(w, x, inputs, ROWS_AT_ONCE, outputs, y);
}

int multiplies_pairs(void) { return 1; }

/* x [rows, inputs], y [rows, outputs] with rows `stride` apart; a row's numbers do not depend on how many there are. */
void pairs_product(const Matrix *matrix, const bf16 *x, int64_t rows, const float *bias, bf16 *y, int64_t stride,
                   int threads) {
    const int64_t outputs = matrix->outputs, inputs = matrix->inputs;
    const bf16 *w = (const bf16 *)matrix->codes;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t o = 0; o < outputs; o += OUTPUTS_AT_ONCE)
        for (int64_t m = 0; m < rows; m += ROWS_AT_ONCE) {
            const int some = rows - m < ROWS_AT_ONCE ? (int)(rows - m) : ROWS_AT_ONCE;
            const int here = outputs - o < OUTPUTS_AT_ONCE ? (int)(outputs - o) : OUTPUTS_AT_ONCE;
            float of[ROWS_AT_ONCE][OUTPUTS_AT_ONCE];
            if (here == OUTPUTS_AT_ONCE)
                pairs_rows(w + o * inputs, x + m * inputs, inputs, some, OUTPUTS_AT_ONCE, of);
            else
                for (int j = 0; j < here; j++) {
                    float one[ROWS_AT_ONCE][OUTPUTS_AT_ONCE];
                    pairs_rows(w + (o + j) * inputs, x + m * inputs, inputs, some, 1, one);
                    for (int r = 0; r < some; r++) of[r][j] = one[r][0];
                }
            for (int r = 0; r < some; r++)
                for (int j = 0; j < here; j++)
                    y[(m + r) * stride + o + j] = narrowed(of[r][j] + (bias ? bias[o + j] : 0));
        }
}

#else

int multiplies_pairs(void) { return 0; }

void pairs_product(const Matrix *matrix, const bf16 *x, int64_t rows, const float *bias, bf16 *y, int64_t stride,
                   int threads) {
    (void)matrix, (void)x, (void)rows, (void)bias, (void)y, (void)stride, (void)threads;
}

#endif
