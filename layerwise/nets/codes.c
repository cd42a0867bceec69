/* Outputs of few rows with a packed matrix by vectors of eight sums; `codes_wide.c` has them for vectors of sixteen. */

#include "packed.h"

#ifndef __AVX512VNNI__

typedef int16_t shorts __attribute__((vector_size(32)));
typedef int16_t loose_shorts __attribute__((vector_size(32), aligned(2)));

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

/* The sum over one group of codes times fixed x, for `rows` rows that lie `apart`. */
INLINE void group_of(const uint8_t *codes, const int16_t *x, int64_t group, int64_t apart, int rows, int kind,
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
            const int16_t *in = x + m * apart;
            part[m] += pairs(first, *(const loose_shorts *)in) + pairs(second, *(const loose_shorts *)(in + HALF));
        }
    }
}

/* Adds to `total` what group `j` of a chunk gives for `rows` rows. */
INLINE void add_group(const uint8_t *codes, const int16_t *x, int64_t group, int64_t apart, int rows, int kind, int j,
                      float factor[MOST_ROWS][MANY], many *total) {
    many_ints part[MOST_ROWS] = {{0}};
    group_of(codes, x, group, apart, rows, kind, part);
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
    for (int64_t first = 0; first < groups; first += MANY) {
        const int64_t count = groups - first < MANY ? groups - first : MANY;
        float factor[MOST_ROWS][MANY];
        many scale = {0}, zero = {0};
        if (o * groups + first + MANY <= w->outputs * groups) { /* what is the next output's meets steps of zero */
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
        if (rows == 1 && count == MANY) {
#pragma GCC unroll 8
            for (int j = 0; j < MANY; j++)
                add_group(codes + j * stored, fixed + j * group, group, x.apart, rows, kind, j, factor, total);
        } else
            for (int64_t j = 0; j < count; j++)
                add_group(codes + j * stored, fixed + j * group, group, x.apart, rows, kind, (int)j, factor, total);
        codes += count * stored;
    }
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++) y[m] = sum_of_many(total[m]);
}

#include "outputs.h"

/* Of every piece of nibbles the inputs at even places, then those at odd ones. */
void lay_out_nibbles(const int16_t *in_order, int64_t first, int64_t group, int16_t *row) {
    for (int64_t p = 0; p < group; p += PIECE)
        for (int i = 0; i < HALF; i++) {
            row[first + p + i] = in_order[p + 2 * i];
            row[first + p + HALF + i] = in_order[p + 2 * i + 1];
        }
}

void numbers_of(const Matrix *w, int64_t o, int64_t g, float *to) {
    const int64_t group = w->group, at = o * (w->inputs / group) + g;
    const float scale = widened(w->scale[at]), zero = w->zero ? widened(w->zero[at]) : 0;
    const uint8_t *codes = w->codes + (w->kind == NIBBLES ? at * group / 2 : at * group);
    if (w->kind == NIBBLES)
        for (int64_t i = 0; i < group / 2; i++) {
            to[2 * i] = (float)((codes[i] & 15) - 8) * scale + zero;
            to[2 * i + 1] = (float)((codes[i] >> 4) - 8) * scale + zero;
        }
    else if (w->kind == BYTES)
        for (int64_t i = 0; i < group; i++) to[i] = (float)(codes[i] - 128) * scale + zero;
    else
        for (int64_t i = 0; i < group; i++) to[i] = (float)(int8_t)codes[i] * scale + zero;
}

#endif
