/* A few rows times a few outputs of a dense matrix, both in bfloat16, for processors that multiply pairs of it. Sums are in
   float32. The matrix is read as it is stored; `dense.c` has the whole product. */

#include "native.h"

#ifdef __AVX512BF16__

enum { NUMBERS = 32 }; /* of a vector */

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

int multiplies_pairs(void) { return 1; }

/* Products of `rows` rows with `outputs` outputs, ROWS_AT_ONCE and OUTPUTS_AT_ONCE at most. */
void pairs_outputs(const bf16 *w, const bf16 *x, int64_t inputs, int rows, int outputs,
                   float y[ROWS_AT_ONCE][OUTPUTS_AT_ONCE]) {
    if (outputs < OUTPUTS_AT_ONCE)
        for (int m = 0; m < rows; m++)
            for (int o = 0; o < outputs; o++) {
                float one[ROWS_AT_ONCE][OUTPUTS_AT_ONCE];
                pairs_tile(w + o * inputs, x + m * inputs, inputs, 1, 1, one);
                y[m][o] = one[0][0];
            }
    else if (rows == 1) pairs_tile(w, x, inputs, 1, OUTPUTS_AT_ONCE, y);
    else if (rows == 2) pairs_tile(w, x, inputs, 2, OUTPUTS_AT_ONCE, y);
    else if (rows == 3) pairs_tile(w, x, inputs, 3, OUTPUTS_AT_ONCE, y);
    else pairs_tile(w, x, inputs, ROWS_AT_ONCE, OUTPUTS_AT_ONCE, y);
}

#else

int multiplies_pairs(void) { return 0; }

void pairs_outputs(const bf16 *w, const bf16 *x, int64_t inputs, int rows, int outputs,
                   float y[ROWS_AT_ONCE][OUTPUTS_AT_ONCE]) {
    (void)w, (void)x, (void)inputs, (void)rows, (void)outputs, (void)y;
}

#endif
