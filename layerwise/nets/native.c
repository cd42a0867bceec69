/* Few rows times a packed matrix, and the small steps between such products, for one processor.

   w = (code - middle) * scale + zero, a scale and a zero for every `group` inputs of an output. A row of x is cut into
   the same groups, each in 16-bit fixed point, so that sums of products are exact integers; the error of a number is at
   most a 65,000th of its group's largest. Codes are nibbles (the even input in the low half of a byte) or bytes.

   Numbers come and go as float32 or bfloat16. A group with an infinity or a NaN makes its row NaN. */

#include "half.h"
#include "packed.h"

enum { LARGEST = 32767, FEW_PACKED = 48 }; /* of fixed point; rows above which numbers are multiplied as floats */

/* A group in fixed point, with its step and its sum. */
static void fix_group(const float *x, int64_t group, int16_t *fixed, float *step, float *sum) {
    int32_t most = 0, total = 0; /* absolute values of floats are ordered as their bits are */
    for (int64_t i = 0; i < group; i++) {
        int32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    if (most >= 0x7f800000) {
        memset(fixed, 0, group * sizeof *fixed);
        *step = *sum = NAN;
        return;
    }
    float largest;
    memcpy(&largest, &most, 4);
    const float inverse = largest > 1e-30f ? LARGEST / largest : 0;
    for (int64_t i = 0; i < group; i++) {
        const int32_t value = (int32_t)rintf(x[i] * inverse);
        fixed[i] = (int16_t)value;
        total += value;
    }
    *step = largest / LARGEST;
    *sum = *step * (float)total;
}

/* y = x w' + bias; x [rows, inputs], y [rows, outputs] with rows `stride` apart. Gives 0, or 1 where memory ran out. */
int packed_product(const Matrix *w, const void *x, int64_t rows, const float *bias, void *y, int64_t stride, int half,
                   int threads) {
    if (rows > FEW_PACKED && !half) return panel_product(w, x, rows, bias, y, stride, threads);
    if (rows > FEW_PACKED && multiplies_pairs()) return pairs_product(w, x, rows, bias, y, stride, threads);
    const int64_t inputs = w->inputs, outputs = w->outputs, groups = inputs / w->group;
    const int64_t whole = (groups + CHUNK - 1) / CHUNK * CHUNK, apart = (inputs + 2 * PIECE - 1) / (2 * PIECE) * 2 * PIECE;
    /* Vectors of x that do not straddle lines of the cache are read a third faster. */
    float *step = aligned_alloc(LINE, lines(rows * (apart * sizeof(int16_t) + 2 * whole * sizeof(float))));
    if (!step) return 1;
    float *sum = step + rows * whole, wide[LARGEST_GROUP];
    int16_t *fixed = (int16_t *)(sum + rows * whole), in_order[LARGEST_GROUP];
    memset(step, 0, rows * (apart * sizeof(int16_t) + 2 * whole * sizeof(float)));
    for (int64_t m = 0; m < rows; m++)
        for (int64_t g = 0; g < groups; g++) {
            for (int64_t i = 0; i < w->group; i++) wide[i] = get(x, m * inputs + g * w->group + i, half);
            const int64_t at = m * whole + g;
            fix_group(wide, w->group, in_order, step + at, sum + at);
            if (w->kind == NIBBLES) lay_out_nibbles(in_order, g * w->group, w->group, fixed + m * apart);
            else memcpy(fixed + m * apart + g * w->group, in_order, w->group * sizeof *fixed);
        }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t from = 0; from < outputs; from += TILE) {
        const int64_t to = outputs - from < TILE ? outputs : from + TILE;
        for (int64_t m = 0; m < rows; m += MOST_ROWS) {
            const int some = rows - m < MOST_ROWS ? (int)(rows - m) : MOST_ROWS;
            float found[TILE][MOST_ROWS];
            const Fixed part = {fixed + m * apart, step + m * whole, sum + m * whole, groups, whole, apart};
            outputs_of(w, from, to, some, part, found);
            for (int r = 0; r < some; r++)
                for (int64_t o = from; o < to; o++)
                    put(y, (m + r) * stride + o, found[o - from][r] + (bias ? bias[o] : 0), half);
        }
    }
    free(step);
    return 0;
}

/* y = the chosen outputs of w, [rows, inputs]: numbers of a table of tokens. Gives 1 where one does not exist. */
int packed_rows(const Matrix *w, const int64_t *chosen, int64_t rows, float *y) {
    for (int64_t m = 0; m < rows; m++)
        if (chosen[m] < 0 || chosen[m] >= w->outputs) return 1;
    for (int64_t m = 0; m < rows; m++)
        for (int64_t g = 0; g < w->inputs / w->group; g++)
            numbers_of(w, chosen[m], g, y + m * w->inputs + g * w->group);
    return 0;
}

/* y = outputs of w from `from` to the one before `to`, [to - from, inputs], rounded once where it is bfloat16. */
void packed_numbers(const Matrix *w, int64_t from, int64_t to, void *y, int half, int threads) {
#pragma omp parallel for num_threads(threads) if ((to - from) * w->inputs > MANY_NUMBERS)
    for (int64_t o = from; o < to; o++)
        for (int64_t g = 0; g < w->inputs / w->group; g++) {
            float numbers[LARGEST_GROUP];
            const int64_t at = (o - from) * w->inputs + g * w->group;
            numbers_of(w, o, g, numbers);
            for (int64_t i = 0; i < w->group; i += MANY)
                if (half) put_many(y, at + i, load_many(numbers + i), 1);
                else put_many(y, at + i, load_many(numbers + i), 0);
        }
}

INLINE void norm_in(const void *x, const float *weight, int64_t rows, int64_t width, float eps, void *y, int half,
                    int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > MANY_NUMBERS)
    for (int64_t m = 0; m < rows; m++) {
        const int64_t row = m * width;
        many squares = {0};
        int64_t i = 0;
        for (; i + MANY <= width; i += MANY) {
            const many some = get_many(x, row + i, half);
            squares += some * some;
        }
        float sum = sum_of_many(squares);
        for (; i < width; i++) sum += get(x, row + i, half) * get(x, row + i, half);
        const float inverse = 1 / sqrtf(sum / (float)width + eps);
        for (i = 0; i + MANY <= width; i += MANY)
            put_many(y, row + i, get_many(x, row + i, half) * inverse * load_many(weight + i), half);
        for (; i < width; i++) put(y, row + i, get(x, row + i, half) * inverse * weight[i], half);
    }
}

/* y = x / sqrt(mean(x^2) + eps) * weight, in float32; x, y [rows, width]. */
void rms_norm(const void *x, const float *weight, int64_t rows, int64_t width, float eps, void *y, int half,
              int threads) {
    if (half) norm_in(x, weight, rows, width, eps, y, 1, threads);
    else norm_in(x, weight, rows, width, eps, y, 0, threads);
}

/* silu x = x / (1 + exp -x); gelu x = x / (1 + exp -2u), where u = sqrt(2 / pi) (x + 0.044715 x^3). */
INLINE many activated(many x, int activation) {
    const many power = activation == SILU ? x : x * (1.59576912f + 0.0713548162f * x * x);
    return x / (1.0f + exp_of(-power));
}

INLINE void gate_in(const void *x, int64_t rows, int64_t width, void *y, int activation, int half, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > MANY_NUMBERS)
    for (int64_t m = 0; m < rows; m++)
        for (int64_t i = 0; i < width; i += MANY) {
            const int64_t gate = 2 * m * width + i, up = gate + width;
            if (i + MANY <= width) {
                const many product = activated(get_many(x, gate, half), activation) * get_many(x, up, half);
                put_many(y, m * width + i, product, half);
                continue;
            }
            many g = {0}, u = {0};
            for (int64_t j = 0; i + j < width; j++) g[j] = get(x, gate + j, half), u[j] = get(x, up + j, half);
            const many product = activated(g, activation) * u;
            for (int64_t j = 0; i + j < width; j++) put(y, m * width + i + j, product[j], half);
        }
}

#ifdef __AVX512BF16__

/* The same by vectors of sixteen; `width` is whole vectors. */
INLINE void gate_half(const bf16 *x, int64_t rows, int64_t width, bf16 *y, int activation, int threads) {
    const __m512 one = _mm512_set1_ps(1), two = _mm512_set1_ps(2), most = _mm512_set1_ps(120);
#pragma omp parallel for num_threads(threads) if (rows * width > MANY_NUMBERS)
    for (int64_t m = 0; m < rows; m++)
        for (int64_t i = 0; i < width; i += LANES) {
            const __m512 gate = values_from(x + 2 * m * width + i), up = values_from(x + (2 * m + 1) * width + i);
            __m512 power = gate;
            if (activation == GELU_TANH)
                power = _mm512_mul_ps(gate, _mm512_fmadd_ps(_mm512_mul_ps(gate, gate), _mm512_set1_ps(0.0713548162f),
                                                            _mm512_set1_ps(1.59576912f)));
            power = _mm512_min_ps(most, _mm512_mul_ps(power, _mm512_set1_ps(-LOG2_OF_E)));
            const __m512 below = _mm512_add_ps(one, two_to(power)), near = _mm512_rcp14_ps(below);
            const __m512 inverse = _mm512_mul_ps(near, _mm512_fnmadd_ps(below, near, two)); /* 28 bits are right */
            store_narrow(y + m * width + i, _mm512_mul_ps(_mm512_mul_ps(gate, inverse), up));
        }
}

#endif

/* y = activation(gate) * up; x holds gate and then up in every row, [rows, 2 * width]. */
void gate_times(const void *x, int64_t rows, int64_t width, void *y, int activation, int half, int threads) {
#ifdef __AVX512BF16__
    if (half && width % LANES == 0) {
        gate_half(x, rows, width, y, activation, threads);
        return;
    }
#endif
    if (half) gate_in(x, rows, width, y, activation, 1, threads);
    else gate_in(x, rows, width, y, activation, 0, threads);
}
