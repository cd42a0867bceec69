/* Any number of rows times a matrix, in bfloat16, for processors that multiply pairs of it. Sums are in float32, each made in
   the same order however many rows there are. A dense matrix is read as it is stored; of a packed one some outputs at a
   time become numbers in bfloat16 first. */

#include "packed.h"

#ifdef __AVX512BF16__

#include <omp.h>

/* Rows and outputs whose sums are made at once; numbers of a vector, which fill a line; outputs that all rows meet before
   the next, and bytes of x that meet all outputs before the next rows. */
enum { ROWS = 6, OUTPUTS = 4, NUMBERS = 32, STAYING = 16, NEAR = 1 << 19 };

/* Memory that is fetched while something else is multiplied: up to `end`, some lines with every vector of inputs. Into the
   second cache, as few lines may be on their way into the first. */
typedef struct { const char *next, *end; int lines; } Ahead;

INLINE __m512bh numbers(const bf16 *from, __mmask32 which) {
    return (__m512bh)(which == 0xffffffff ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(which, from));
}

/* The sums of four vectors, in as many steps as two take one by one. */
INLINE __m128 four_sums(const __m512 x[4]) {
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

typedef __m512 Sums[ROWS][OUTPUTS];

/* Adds what the inputs from `i` on give, of a vector those in `which`. */
INLINE void add_inputs(const bf16 *w, const bf16 *x, int64_t inputs, int64_t i, __mmask32 which, int rows, int outputs,
                       Sums sum) {
    __m512bh weights[OUTPUTS];
#pragma GCC unroll 4
    for (int o = 0; o < outputs; o++) weights[o] = numbers(w + o * inputs + i, which);
#pragma GCC unroll 6
    for (int m = 0; m < rows; m++) {
        const __m512bh some = numbers(x + m * inputs + i, which);
#pragma GCC unroll 4
        for (int o = 0; o < outputs; o++) sum[m][o] = _mm512_dpbf16_ps(sum[m][o], some, weights[o]);
    }
}

/* Products of `rows` rows with `outputs` outputs, four or one. */
INLINE void tile(const bf16 *w, const bf16 *x, int64_t inputs, int rows, int outputs, Ahead *ahead, const float *bias,
                 bf16 *y, int64_t stride) {
    Sums sum;
    const int fetched = ahead->next < ahead->end ? ahead->lines : 0;
    const char *next = ahead->next;
#pragma GCC unroll 6
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int o = 0; o < outputs; o++) sum[m][o] = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + NUMBERS <= inputs; i += NUMBERS) {
        for (int line = 0; line < fetched; line++, next += LINE) __builtin_prefetch(next, 0, 2);
        add_inputs(w, x, inputs, i, 0xffffffff, rows, outputs, sum);
    }
    ahead->next = next;
    if (i < inputs) add_inputs(w, x, inputs, i, (1u << (inputs - i)) - 1, rows, outputs, sum);
#pragma GCC unroll 6
    for (int m = 0; m < rows; m++) {
        __m128 all = outputs == 1 ? _mm_set_ss(_mm512_reduce_add_ps(sum[m][0])) : four_sums(sum[m]);
        if (bias) all = _mm_add_ps(all, outputs == 1 ? _mm_load_ss(bias) : _mm_loadu_ps(bias));
        const __m128i narrow = (__m128i)_mm_cvtneps_pbh(all);
        memcpy(y + m * stride, &narrow, outputs * sizeof *y);
    }
}

/* All rows of x with some outputs. */
static void some_outputs(const bf16 *w, int64_t outputs, const bf16 *x, int64_t rows, int64_t inputs, Ahead ahead,
                         const float *bias, bf16 *y, int64_t stride) {
    for (int64_t m = 0, some; m < rows; m += some) {
        int64_t o = 0;
        some = even_part(rows - m, ROWS);
        for (; o + OUTPUTS <= outputs; o += OUTPUTS) {
            const bf16 *from = w + o * inputs, *of = x + m * inputs;
            const float *more = bias ? bias + o : NULL;
            bf16 *to = y + m * stride + o;
#define TAKE(n) tile(from, of, inputs, n, OUTPUTS, &ahead, more, to, stride)
            switch (some) { SIX_ROWS(TAKE) }
#undef TAKE
        }
        for (; o < outputs; o++)
            for (int64_t r = m; r < m + some; r++)
                tile(w + o * inputs, x + r * inputs, inputs, 1, 1, &ahead, bias ? bias + o : NULL, y + r * stride + o,
                     stride);
    }
}

/* Lines to fetch with every vector so that the outputs that come next are there when all these rows have met the present
   ones: fetched all at once they would be waited for. */
static int lines_each(int64_t rows) {
    const int64_t parts = (rows + ROWS - 1) / ROWS;
    return (int)((OUTPUTS + parts - 1) / parts);
}

INLINE int64_t at_most(int64_t most, int64_t number) { return number < most ? number : most; }

int multiplies_pairs(void) { return 1; }

/* x [rows, inputs], y [rows, outputs] with rows `stride` apart. Gives 0, or 1 where memory ran out. */
int pairs_product(const Matrix *w, const bf16 *x, int64_t rows, const float *bias, bf16 *y, int64_t stride, int threads) {
    if (rows == 0) return 0;
    const int64_t inputs = w->inputs, near = NEAR / 2 / inputs, chunk = even_part(rows, near > ROWS ? near : ROWS);
    const int dense = w->kind == BFLOAT16;
    const size_t own = dense ? 0 : lines(STAYING * inputs * sizeof *x);
    char *memory = dense ? NULL : aligned_alloc(LINE, threads * own);
    if (!dense && !memory) return 1;
#pragma omp parallel num_threads(threads)
    for (int64_t m = 0; m < rows; m += chunk) {
        const int64_t here = at_most(chunk, rows - m);
        const int fetched = dense ? lines_each(here) : 0;
#pragma omp for schedule(static)
        for (int64_t o = 0; o < w->outputs; o += STAYING) {
            const int64_t some = at_most(STAYING, w->outputs - o), more = at_most(STAYING, w->outputs - o - some);
            const bf16 *from = (const bf16 *)w->codes + o * inputs, *next = from + some * inputs;
            const Ahead ahead = {(const char *)next, (const char *)(next + more * inputs), fetched};
            if (!dense) {
                bf16 *to = (bf16 *)(memory + omp_get_thread_num() * own);
                packed_numbers(w, o, o + some, to, 1, 1);
                from = to;
            }
            some_outputs(from, some, x + m * inputs, here, inputs, ahead, bias ? bias + o : NULL, y + m * stride + o,
                         stride);
        }
    }
    free(memory);
    return 0;
}

#else

int multiplies_pairs(void) { return 0; }

int pairs_product(const Matrix *w, const bf16 *x, int64_t rows, const float *bias, bf16 *y, int64_t stride, int threads) {
    (void)w, (void)x, (void)rows, (void)bias, (void)y, (void)stride;
    return threads;
}

#endif
