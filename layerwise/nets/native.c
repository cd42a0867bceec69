/* Few rows times a packed matrix, and the small steps between such products, for one processor.

   w = (code - middle) * scale + zero, a scale and a zero for every `group` inputs of an output. A row of x is cut into
   the same groups, each in 16-bit fixed point, so that sums of products are exact integers; the error of a number is at
   most a 65,000th of its group's largest. Codes are nibbles (the even input in the low half of a byte) or bytes.

   Numbers come and go as float32 or bfloat16. A group with an infinity or a NaN makes its row NaN. */

#include "native.h"

typedef int16_t shorts __attribute__((vector_size(32)));
typedef int16_t loose_shorts __attribute__((vector_size(32), aligned(2)));

enum { PIECE = 32, HALF = PIECE / 2, MOST_ROWS = 4, LARGEST_GROUP = 256, CHUNK = MANY, LARGEST = 32767, TILE = 16 };

typedef struct {
    const int16_t *fixed;    /* [rows, inputs]; for nibbles, of every piece the even inputs and then the odd ones */
    const float *step, *sum; /* [rows, whole], of every group; zero where there is none */
    int64_t groups, whole;   /* groups in a row, and rounded up to whole chunks */
} Fixed;

/* `pairs` is a0 b0 + a1 b1, a2 b2 + a3 b3, ...; the others are sixteen bytes as they are, and with their signs. */
#ifdef __AVX2__
INLINE many_ints pairs(shorts a, shorts b) { return (many_ints)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
INLINE shorts from_bytes(const uint8_t *x) { return (shorts)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)x)); }
INLINE shorts from_signed(const uint8_t *x) {
    return (shorts)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)x));
}
#else
typedef uint8_t loose_bytes __attribute__((vector_size(16), aligned(1)));
typedef int8_t signed_bytes __attribute__((vector_size(16)));
INLINE many_ints pairs(shorts a, shorts b) {
    many_ints sum;
    for (int i = 0; i < MANY; i++) sum[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
    return sum;
}
INLINE shorts from_bytes(const uint8_t *x) { return __builtin_convertvector(*(const loose_bytes *)x, shorts); }
INLINE shorts from_signed(const uint8_t *x) {
    return __builtin_convertvector((signed_bytes)*(const loose_bytes *)x, shorts);
}
#endif

static void fix_group(const float *x, int64_t group, int64_t kind, int16_t *fixed, float *step, float *sum) {
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
    int16_t in_order[LARGEST_GROUP];
    for (int64_t i = 0; i < group; i++) {
        const int32_t value = (int32_t)rintf(x[i] * inverse);
        in_order[i] = (int16_t)value;
        total += value;
    }
    *step = largest / LARGEST;
    *sum = *step * (float)total;
    if (kind != NIBBLES) {
        memcpy(fixed, in_order, group * sizeof *fixed);
        return;
    }
    for (int64_t p = 0; p < group; p += PIECE)
        for (int i = 0; i < HALF; i++) {
            fixed[p + i] = in_order[p + 2 * i];
            fixed[p + HALF + i] = in_order[p + 2 * i + 1];
        }
}

/* The sum over one group of codes times fixed x, for `rows` rows that lie `inputs` apart. */
INLINE void group_of(const uint8_t *codes, const int16_t *x, int64_t group, int64_t inputs, int rows, int kind,
                     many_ints *part) {
    for (int64_t i = 0; i < group; i += PIECE, x += PIECE) {
        shorts first, second;
        if (kind == NIBBLES) {
            const shorts both = from_bytes(codes);
            first = both & 15, second = both >> 4;
            codes += HALF;
        } else {
            first = kind == BYTES ? from_bytes(codes) : from_signed(codes);
            second = kind == BYTES ? from_bytes(codes + HALF) : from_signed(codes + HALF);
            codes += PIECE;
        }
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) {
            const int16_t *in = x + m * inputs;
            part[m] += pairs(first, *(const loose_shorts *)in) + pairs(second, *(const loose_shorts *)(in + HALF));
        }
    }
}

/* Adds to `total` what group `j` of a chunk gives for `rows` rows. */
INLINE void add_group(const uint8_t *codes, const int16_t *x, int64_t group, int64_t inputs, int rows, int kind, int j,
                      float factor[MOST_ROWS][CHUNK], many *total) {
    many_ints part[MOST_ROWS] = {{0}};
    group_of(codes, x, group, inputs, rows, kind, part);
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++) total[m] += __builtin_convertvector(part[m], many) * factor[m][j];
}

/* One output of `rows` rows; `rows`, `kind` and a group of one piece are constants where it is used. */
INLINE void output(const Matrix *w, int64_t o, int rows, Fixed x, float *y, int kind, int64_t group) {
    const int64_t groups = x.groups, stored = kind == NIBBLES ? group / 2 : group;
    const uint8_t *codes = w->codes + o * groups * stored;
    const bf16 *scales = w->scale + o * groups, *zeros = w->zero ? w->zero + o * groups : NULL;
    const float middle = kind == NIBBLES ? 8 : kind == BYTES ? 128 : 0;
    many total[MOST_ROWS] = {{0}};
    for (int64_t first = 0; first < groups; first += CHUNK) {
        const int64_t count = groups - first < CHUNK ? groups - first : CHUNK;
        float factor[MOST_ROWS][CHUNK];
        many scale = {0}, zero = {0};
        if (o * groups + first + CHUNK <= w->outputs * groups) { /* what is the next output's meets steps of zero */
            scale = load_many_bf16(scales + first);
            if (zeros) zero = load_many_bf16(zeros + first);
        } else
            for (int64_t j = 0; j < count; j++) {
                scale[j] = widened(scales[first + j]);
                if (zeros) zero[j] = widened(zeros[first + j]);
            }
        const many shift = zero - middle * scale;
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) {
            const int64_t at = m * x.whole + first;
            const many f = scale * *(const loose_many *)(x.step + at);
            memcpy(factor[m], &f, sizeof f);
            __asm__("" : "+m"(factor[m])); /* to be read from memory: shuffling it across the vector takes longer */
            total[m] += shift * *(const loose_many *)(x.sum + at);
        }
        const int16_t *fixed = x.fixed + first * group;
        if (rows == 1 && count == CHUNK) {
#pragma GCC unroll 8
            for (int j = 0; j < CHUNK; j++)
                add_group(codes + j * stored, fixed + j * group, group, w->inputs, rows, kind, j, factor, total);
        } else
            for (int64_t j = 0; j < count; j++)
                add_group(codes + j * stored, fixed + j * group, group, w->inputs, rows, kind, (int)j, factor, total);
        codes += count * stored;
    }
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++) y[m] = sum_of_many(total[m]);
}

/* A few outputs at a time, so that what is the same for all of them is found once. */
INLINE void outputs_in(const Matrix *w, int64_t from, int64_t to, int rows, Fixed x, float y[TILE][MOST_ROWS], int kind,
                       int64_t group) {
    for (int64_t o = from; o < to; o++) output(w, o, rows, x, y[o - from], kind, group);
}

#define OF_KIND(n)                                                                                 \
    if (w->kind == NIBBLES && w->group == PIECE) outputs_in(w, from, to, n, x, y, NIBBLES, PIECE); \
    else if (w->kind == NIBBLES) outputs_in(w, from, to, n, x, y, NIBBLES, w->group);              \
    else if (w->kind == BYTES) outputs_in(w, from, to, n, x, y, BYTES, w->group);                  \
    else outputs_in(w, from, to, n, x, y, SIGNED_BYTES, w->group)

static void outputs_of(const Matrix *w, int64_t from, int64_t to, int rows, const Fixed x, float y[TILE][MOST_ROWS]) {
    if (rows == 1) { OF_KIND(1); }
    else if (rows == 2) { OF_KIND(2); }
    else if (rows == 3) { OF_KIND(3); }
    else { OF_KIND(4); }
}

/* y = x w' + bias; x [rows, inputs], y [rows, outputs] with rows `stride` apart. Gives 0, or 1 where memory ran out. */
int packed_product(const Matrix *w, const void *x, int64_t rows, const float *bias, void *y, int64_t stride, int half,
                   int threads) {
    const int64_t inputs = w->inputs, outputs = w->outputs, groups = inputs / w->group;
    const int64_t whole = (groups + CHUNK - 1) / CHUNK * CHUNK;
    /* Vectors of x that do not straddle lines of the cache are read a third faster. */
    float *step = aligned_alloc(LINE, lines(rows * (inputs * sizeof(int16_t) + 2 * whole * sizeof(float))));
    if (!step) return 1;
    float *sum = step + rows * whole, wide[LARGEST_GROUP];
    int16_t *fixed = (int16_t *)(sum + rows * whole);
    memset(step, 0, 2 * rows * whole * sizeof(float));
    for (int64_t m = 0; m < rows; m++)
        for (int64_t g = 0; g < groups; g++) {
            for (int64_t i = 0; i < w->group; i++) wide[i] = get(x, m * inputs + g * w->group + i, half);
            const int64_t at = m * whole + g;
            fix_group(wide, w->group, w->kind, fixed + m * inputs + g * w->group, step + at, sum + at);
        }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t from = 0; from < outputs; from += TILE) {
        const int64_t to = outputs - from < TILE ? outputs : from + TILE;
        for (int64_t m = 0; m < rows; m += MOST_ROWS) {
            const int some = rows - m < MOST_ROWS ? (int)(rows - m) : MOST_ROWS;
            float found[TILE][MOST_ROWS];
            const Fixed part = {fixed + m * inputs, step + m * whole, sum + m * whole, groups, whole};
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
    const int64_t groups = w->inputs / w->group, middle = w->kind == NIBBLES ? 8 : w->kind == BYTES ? 128 : 0;
    for (int64_t m = 0; m < rows; m++)
        if (chosen[m] < 0 || chosen[m] >= w->outputs) return 1;
    for (int64_t m = 0; m < rows; m++)
        for (int64_t i = 0; i < w->inputs; i++) {
            const int64_t at = chosen[m] * w->inputs + i, group = chosen[m] * groups + i / w->group;
            const int code = w->kind == NIBBLES ? w->codes[at / 2] >> 4 * (at & 1) & 15
                           : w->kind == BYTES ? w->codes[at] : (int8_t)w->codes[at];
            const float value = (float)(code - middle) * widened(w->scale[group]);
            y[m * w->inputs + i] = w->zero ? value + widened(w->zero[group]) : value;
        }
    return 0;
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

/* y = activation(gate) * up; x holds gate and then up in every row, [rows, 2 * width]. */
void gate_times(const void *x, int64_t rows, int64_t width, void *y, int activation, int half, int threads) {
    if (half) gate_in(x, rows, width, y, activation, 1, threads);
    else gate_in(x, rows, width, y, activation, 0, threads);
}
