/* Few rows times a packed matrix, and the small steps between such products, for one processor.

   w = (code - middle) * scale + zero, a scale and a zero for every `group` inputs of an output. A row of x is cut into
   the same groups, each in fixed point, so that sums of products are exact integers. Codes are nibbles (the even input
   in the low half of a byte), which are multiplied with the two digits of a 10-bit x by themselves, or bytes, for which
   x has 16 bits: its error is at most a thousandth or a 65,000th of the group's largest number.
   `benchmarks/input_bits.py` compares 10 bits with 8, which other engines use, and with bfloat16.

   Numbers come and go as float32 or bfloat16. A group with an infinity or a NaN makes its row NaN. */

#include "native.h"

typedef uint8_t bytes __attribute__((vector_size(16)));
typedef int8_t digits __attribute__((vector_size(16)));
typedef int16_t shorts __attribute__((vector_size(16)));
typedef uint8_t loose_bytes __attribute__((vector_size(16), aligned(1)));
typedef uint8_t loose_half __attribute__((vector_size(8), aligned(1)));
typedef int8_t signed_half __attribute__((vector_size(8)));

enum { PIECE = 32, MOST_ROWS = 4, LARGEST_GROUP = 256, CHUNK = 8 };
enum { SHIFT = 3, BASE = 1 << SHIFT, LARGEST_OF_TWO_DIGITS = 63 * BASE + BASE / 2 - 1 };

typedef struct {
    const int16_t *fixed;    /* [rows, inputs]; for nibbles a piece is its high digits and then its low ones, of even
                                inputs and then of odd ones */
    const float *step, *sum; /* [rows, whole], of every group; zero where there is none */
    int64_t groups, whole;   /* groups in a row, and rounded up to whole chunks */
} Fixed;

/* a0 b0 + a1 b1, a2 b2 + a3 b3, ... */
#ifdef __SSSE3__
#include <immintrin.h>
INLINE shorts pairs_of_bytes(bytes a, digits b) { return (shorts)_mm_maddubs_epi16((__m128i)a, (__m128i)b); }
INLINE ints pairs(shorts a, shorts b) { return (ints)_mm_madd_epi16((__m128i)a, (__m128i)b); }
#else
INLINE shorts pairs_of_bytes(bytes a, digits b) {
    shorts sum;
    for (int i = 0; i < 8; i++) sum[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
    return sum;
}
INLINE ints pairs(shorts a, shorts b) {
    ints sum;
    for (int i = 0; i < LANES; i++) sum[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
    return sum;
}
#endif

INLINE bytes load(const void *from) { return *(const loose_bytes *)from; }
INLINE loose_half load_half(const uint8_t *from) { return *(const loose_half *)from; }

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
    const float top = kind == NIBBLES ? LARGEST_OF_TWO_DIGITS : 32767, inverse = largest > 1e-30f ? top / largest : 0;
    int16_t in_order[LARGEST_GROUP];
    for (int64_t i = 0; i < group; i++) {
        const int32_t value = (int32_t)rintf(x[i] * inverse);
        in_order[i] = (int16_t)value;
        total += value;
    }
    *step = largest / top;
    *sum = *step * (float)total;
    if (kind != NIBBLES) {
        memcpy(fixed, in_order, group * sizeof *fixed);
        return;
    }
    int8_t *piece = (int8_t *)fixed;
    for (int64_t p = 0; p < group; p += PIECE, piece += 2 * PIECE)
        for (int i = 0; i < PIECE; i++) {
            const int value = in_order[p + i], low = ((value + BASE / 2) & (BASE - 1)) - BASE / 2;
            const int at = i / 2 + (i & 1) * PIECE / 2;
            piece[at] = (int8_t)((value - low) / BASE);
            piece[at + PIECE] = (int8_t)low;
        }
}

/* The sum over one group of codes times fixed x, for `rows` rows that lie `inputs` apart. */
INLINE void group_of(const uint8_t *codes, const int16_t *x, int64_t group, int64_t inputs, int rows, int kind,
                     ints *part) {
    for (int64_t i = 0; i < group; i += PIECE, x += PIECE) {
        const int16_t *in = x;
        if (kind == NIBBLES) {
            const bytes both = load(codes), even = both & 15, odd = both >> 4;
            codes += PIECE / 2;
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++, in += inputs) {
                const digits *d = (const digits *)in;
                const shorts high = pairs_of_bytes(even, d[0]) + pairs_of_bytes(odd, d[1]);
                const shorts low = pairs_of_bytes(even, d[2]) + pairs_of_bytes(odd, d[3]);
                part[m] += pairs((high << SHIFT) + low, (shorts){1, 1, 1, 1, 1, 1, 1, 1}); /* 4 * 15 * 508 < 2^15 */
            }
        } else {
#pragma GCC unroll 4
            for (int j = 0; j < PIECE; j += 8, codes += 8) {
                const loose_half eight = load_half(codes);
                const shorts code = kind == BYTES ? __builtin_convertvector(eight, shorts)
                                                  : __builtin_convertvector((signed_half)eight, shorts);
#pragma GCC unroll 4
                for (int m = 0; m < rows; m++) part[m] += pairs(code, (shorts)load(in + m * inputs + j));
            }
        }
    }
}

/* Adds to `total` what group `j` of a chunk gives for `rows` rows. */
INLINE void add_group(const uint8_t *codes, const int16_t *x, int64_t group, int64_t inputs, int rows, int kind, int j,
                      float factor[MOST_ROWS][CHUNK], floats *total) {
    ints part[MOST_ROWS] = {{0}};
    group_of(codes, x, group, inputs, rows, kind, part);
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++) total[m] += __builtin_convertvector(part[m], floats) * factor[m][j];
}

/* One output of `rows` rows; `rows`, `kind` and a group of one piece are constants where it is used. */
INLINE void output(const Matrix *w, int64_t o, int rows, Fixed x, float *y, int kind, int64_t group) {
    const int64_t groups = x.groups, stored = kind == NIBBLES ? group / 2 : group;
    const uint8_t *codes = w->codes + o * groups * stored;
    const bf16 *scales = w->scale + o * groups, *zeros = w->zero ? w->zero + o * groups : NULL;
    const float middle = kind == NIBBLES ? 8 : kind == BYTES ? 128 : 0;
    floats total[MOST_ROWS] = {{0}};
    for (int64_t first = 0; first < groups; first += CHUNK) {
        const int64_t count = groups - first < CHUNK ? groups - first : CHUNK;
        float factor[MOST_ROWS][CHUNK];
        floats scale[2] = {{0}}, shift[2] = {{0}};
        if (count == CHUNK) {
            for (int h = 0; h < 2; h++) {
                scale[h] = load_bf16(scales + first + LANES * h);
                shift[h] = (zeros ? load_bf16(zeros + first + LANES * h) : (floats){0}) - middle * scale[h];
            }
        } else
            for (int64_t j = 0; j < count; j++) {
                const float s = widened(scales[first + j]);
                scale[j / LANES][j % LANES] = s;
                shift[j / LANES][j % LANES] = (zeros ? widened(zeros[first + j]) : 0) - middle * s;
            }
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++)
            for (int h = 0; h < 2; h++) {
                const int64_t at = m * x.whole + first + LANES * h;
                const floats f = scale[h] * load_floats(x.step + at);
                memcpy(factor[m] + LANES * h, &f, sizeof f);
                total[m] += shift[h] * load_floats(x.sum + at);
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
    for (int m = 0; m < rows; m++) y[m] = sum_of(total[m]);
}

#define OF_KIND(n)                                                                      \
    if (w->kind == NIBBLES && w->group == PIECE) output(w, o, n, x, y, NIBBLES, PIECE); \
    else if (w->kind == NIBBLES) output(w, o, n, x, y, NIBBLES, w->group);              \
    else if (w->kind == BYTES) output(w, o, n, x, y, BYTES, w->group);                  \
    else output(w, o, n, x, y, SIGNED_BYTES, w->group)

static void outputs_of(const Matrix *w, int64_t o, int rows, const Fixed x, float *y) {
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
    int16_t *fixed = malloc(rows * (inputs * sizeof(int16_t) + 2 * whole * sizeof(float)));
    if (!fixed) return 1;
    float *step = (float *)(fixed + rows * inputs), *sum = step + rows * whole, wide[LARGEST_GROUP];
    memset(step, 0, 2 * rows * whole * sizeof(float));
    for (int64_t m = 0; m < rows; m++)
        for (int64_t g = 0; g < groups; g++) {
            for (int64_t i = 0; i < w->group; i++) wide[i] = get(x, m * inputs + g * w->group + i, half);
            const int64_t at = m * whole + g;
            fix_group(wide, w->group, w->kind, fixed + m * inputs + g * w->group, step + at, sum + at);
        }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t o = 0; o < outputs; o++)
        for (int64_t m = 0; m < rows; m += MOST_ROWS) {
            const int some = rows - m < MOST_ROWS ? (int)(rows - m) : MOST_ROWS;
            float of_rows[MOST_ROWS];
            const Fixed part = {fixed + m * inputs, step + m * whole, sum + m * whole, groups, whole};
            outputs_of(w, o, some, part, of_rows);
            for (int r = 0; r < some; r++) put(y, (m + r) * stride + o, of_rows[r] + (bias ? bias[o] : 0), half);
        }
    free(fixed);
    return 0;
}

INLINE void norm_in(const void *x, const float *weight, int64_t rows, int64_t width, float eps, void *y, int half) {
    for (int64_t m = 0; m < rows; m++) {
        const int64_t row = m * width;
        floats squares[2] = {{0}};
        int64_t i = 0;
        for (; i + 2 * LANES <= width; i += 2 * LANES)
            for (int j = 0; j < 2; j++) {
                const floats four = get_four(x, row + i + LANES * j, half);
                squares[j] += four * four;
            }
        float sum = sum_of(squares[0] + squares[1]);
        for (; i < width; i++) sum += get(x, row + i, half) * get(x, row + i, half);
        const float inverse = 1 / sqrtf(sum / (float)width + eps);
        for (i = 0; i < width; i++) put(y, row + i, get(x, row + i, half) * inverse * weight[i], half);
    }
}

/* y = x / sqrt(mean(x^2) + eps) * weight, in float32; x, y [rows, width]. */
void rms_norm(const void *x, const float *weight, int64_t rows, int64_t width, float eps, void *y, int half) {
    if (half) norm_in(x, weight, rows, width, eps, y, 1);
    else norm_in(x, weight, rows, width, eps, y, 0);
}

/* silu x = x / (1 + exp -x); gelu x = x / (1 + exp -2u), where u = sqrt(2 / pi) (x + 0.044715 x^3). */
INLINE floats activated(floats x, int activation) {
    const floats power = activation == SILU ? x : x * (1.59576912f + 0.0713548162f * x * x);
    return x / (1.0f + exp_of(-power));
}

INLINE void gate_in(const void *x, int64_t rows, int64_t width, void *y, int activation, int half) {
    for (int64_t m = 0; m < rows; m++)
        for (int64_t i = 0; i < width; i += LANES) {
            const int64_t gate = 2 * m * width + i, up = gate + width, count = width - i < LANES ? width - i : LANES;
            floats g = {0}, u = {0};
            if (count == LANES) g = get_four(x, gate, half), u = get_four(x, up, half);
            else
                for (int j = 0; j < count; j++) g[j] = get(x, gate + j, half), u[j] = get(x, up + j, half);
            const floats product = activated(g, activation) * u;
            for (int j = 0; j < count; j++) put(y, m * width + i + j, product[j], half);
        }
}

/* y = activation(gate) * up; x holds gate and then up in every row, [rows, 2 * width]. */
void gate_times(const void *x, int64_t rows, int64_t width, void *y, int activation, int half) {
    if (half) gate_in(x, rows, width, y, activation, 1);
    else gate_in(x, rows, width, y, activation, 0);
}
