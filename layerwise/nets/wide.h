/* The widest vectors of float32 that the processor has, and a product of a few rows with a panel: columns whose numbers lie
   step by step, so that a vector holds those of one step. */

#pragma once

#include "native.h"

/* Floats of a vector; rows of a product whose sums stay in registers. */
#ifdef __AVX512F__
enum { WIDE = 16, ROWS_OF_SUMS = 12 };
#else
enum { WIDE = 8, ROWS_OF_SUMS = 6 };
#endif
enum { COLUMNS = 2 * WIDE };

typedef float wide __attribute__((vector_size(4 * WIDE)));
typedef float loose_wide __attribute__((vector_size(4 * WIDE), aligned(4)));
typedef int32_t wide_ints __attribute__((vector_size(4 * WIDE)));

#ifdef __AVX512F__
INLINE wide plus_wide(wide sum, wide a, wide b) { return (wide)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum); }
#else
INLINE wide plus_wide(wide sum, wide a, wide b) { return plus_product(sum, a, b); }
#endif

INLINE wide load_wide(const float *from) { return *(const loose_wide *)from; }

INLINE void store_wide(float *to, wide value) { *(loose_wide *)to = value; }

/* Numbers from number `i` on, in bfloat16. */
INLINE void put_wide(void *to, int64_t i, wide value) {
    many parts[WIDE / MANY];
    memcpy(parts, &value, sizeof parts);
    for (int j = 0; j < WIDE / MANY; j++) put_many(to, i + j * MANY, parts[j], 1);
}

INLINE wide larger(wide a, wide b) {
    const wide_ints more = a > b;
    return (wide)(((wide_ints)a & more) | ((wide_ints)b & ~more));
}

/* The halves of a vector of sixteen, or all of one of eight, twice. */
INLINE many low_of(wide x) { many low; memcpy(&low, &x, sizeof low); return low; }
INLINE many high_of(wide x) { many high; memcpy(&high, (char *)&x + sizeof x - sizeof high, sizeof high); return high; }

INLINE float most_of_wide(wide x) { return fmaxf(most_of_many(low_of(x)), most_of_many(high_of(x))); }

INLINE float sum_of_wide(wide x) {
    return sum_of_many((int)WIDE == (int)MANY ? low_of(x) : low_of(x) + high_of(x));
}

/* exp x for x of 0 and below: an error of a millionth of what matters; 0 where float32 has no number for it. */
INLINE wide weight_of(wide x) {
#ifdef __AVX512DQ__
    return (wide)two_to((__m512)(x * LOG2_OF_E));
#else
    many parts[WIDE / MANY];
    memcpy(parts, &x, sizeof parts);
    for (int i = 0; i < WIDE / MANY; i++) parts[i] = exp_of(parts[i]);
    memcpy(&x, parts, sizeof x);
    return x;
#endif
}

/* The number that 16 bits stand for, exactly. */
INLINE float half_value(uint16_t bits, int kind) {
    if (kind == BFLOAT16) return widened(bits);
    const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = bits & 0x7fff;
    uint32_t wide = rest >= 0x7c00 ? 0x7f800000 | rest << 13 : rest << 13;
    float value = 0;
    memcpy(&value, &wide, 4);
    if (rest < 0x7c00) value *= 0x1p112f; /* the exponent's other bias; numbers below the normal ones come right too */
    memcpy(&wide, &value, 4);
    wide |= sign;
    memcpy(&value, &wide, 4);
    return value;
}

/* Eight numbers of 32 bits of eight rows turned over: `to` lies COLUMNS apart. */
INLINE void turn_over_rows(const float *const rows[MANY], int64_t at, float *to) {
#ifdef __AVX__
    __m256 x[MANY], y[MANY];
#pragma GCC unroll 8
    for (int i = 0; i < MANY; i++) x[i] = _mm256_loadu_ps(rows[i] + at);
#pragma GCC unroll 4
    for (int i = 0; i < MANY; i += 2)
        y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]), y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
#pragma GCC unroll 2
    for (int i = 0; i < MANY; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            x[i + 2 * j] = _mm256_shuffle_ps(y[i + j], y[i + 2 + j], 0x44);
            x[i + 2 * j + 1] = _mm256_shuffle_ps(y[i + j], y[i + 2 + j], 0xee);
        }
#pragma GCC unroll 4
    for (int i = 0; i < MANY / 2; i++) {
        _mm256_storeu_ps(to + i * COLUMNS, _mm256_permute2f128_ps(x[i], x[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * COLUMNS, _mm256_permute2f128_ps(x[i], x[i + 4], 0x31));
    }
#else
    for (int i = 0; i < MANY; i++)
        for (int j = 0; j < MANY; j++) memcpy(to + j * COLUMNS + i, rows[i] + at + j, sizeof *to);
#endif
}

/* The same for rows that lie `apart`. */
INLINE void turn_over(const float *from, int64_t apart, float *to) {
    const float *rows[MANY];
#pragma GCC unroll 8
    for (int i = 0; i < MANY; i++) rows[i] = from + i * apart;
    turn_over_rows(rows, 0, to);
}

enum { SIXTEEN = 16 };

/* Eight numbers in bfloat16 of sixteen rows, turned over as float32: `to` lies COLUMNS apart. */
INLINE void widen_over(const bf16 *const rows[SIXTEEN], int64_t at, float *to) {
#ifdef __AVX2__
    __m256i x[MANY], y[MANY];
    /* Rows in this order, so that they come in their own in the end: every step works in both halves of a vector. */
#pragma GCC unroll 8
    for (int i = 0; i < MANY; i++) {
        const int row = i < 4 ? i : i + 4;
        const __m128i low = _mm_loadu_si128((const void *)(rows[row] + at));
        x[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), _mm_loadu_si128((const void *)(rows[row + 4] + at)), 1);
    }
#pragma GCC unroll 4
    for (int i = 0; i < MANY; i += 2)
        y[i] = _mm256_unpacklo_epi16(x[i], x[i + 1]), y[i + 1] = _mm256_unpackhi_epi16(x[i], x[i + 1]);
#pragma GCC unroll 2
    for (int i = 0; i < MANY; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            x[i + 2 * j] = _mm256_unpacklo_epi32(y[i + j], y[i + 2 + j]);
            x[i + 2 * j + 1] = _mm256_unpackhi_epi32(y[i + j], y[i + 2 + j]);
        }
#pragma GCC unroll 4
    for (int i = 0; i < MANY / 2; i++) {
        y[2 * i] = _mm256_unpacklo_epi64(x[i], x[i + 4]);
        y[2 * i + 1] = _mm256_unpackhi_epi64(x[i], x[i + 4]);
    }
    const __m256i none = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int i = 0; i < MANY; i++) { /* the bits of a number in bfloat16 are the upper ones of one in float32 */
        _mm256_storeu_si256((void *)(to + i * COLUMNS), _mm256_unpacklo_epi16(none, y[i]));
        _mm256_storeu_si256((void *)(to + i * COLUMNS + MANY), _mm256_unpackhi_epi16(none, y[i]));
    }
#else
    for (int i = 0; i < MANY; i++)
        for (int j = 0; j < SIXTEEN; j++) to[i * COLUMNS + j] = widened(rows[j][at + i]);
#endif
}

/* sum + a b, where a and b hold pairs of numbers in bfloat16, of which both products are added. */
INLINE wide plus_pairs(wide sum, wide a, wide b) {
#ifdef __AVX512BF16__
    return (wide)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    const int32_t upper = (int32_t)0xffff0000;
    sum = plus_wide(sum, (wide)((wide_ints)a << 16), (wide)((wide_ints)b << 16));
    return plus_wide(sum, (wide)((wide_ints)a & upper), (wide)((wide_ints)b & upper));
#endif
}

/* Adds to `sum` what `count` rows, `apart`, give with a panel of so many steps, `across`; each sum is made in their order. A
   step is a number, or a pair of numbers in bfloat16. */
INLINE void add_panel(const float *rows, int64_t apart, const float *panel, int64_t across, int64_t steps, int count,
                      int pairs, wide sum[ROWS_OF_SUMS][2]) {
    for (int64_t i = 0; i < steps; i++) {
        const wide a = load_wide(panel + i * across), b = load_wide(panel + i * across + WIDE);
#pragma GCC unroll 12
        for (int m = 0; m < count; m++) {
            int32_t bits;
            memcpy(&bits, rows + m * apart + i, sizeof bits);
            const wide x = (wide)(bits - (wide_ints){0});
            sum[m][0] = pairs ? plus_pairs(sum[m][0], x, a) : plus_wide(sum[m][0], x, a);
            sum[m][1] = pairs ? plus_pairs(sum[m][1], x, b) : plus_wide(sum[m][1], x, b);
        }
    }
}

/* How many rows to take at once of those that are left; CALL with as many, a constant. */
INLINE int rows_at_once(int64_t left) { return even_part(left, ROWS_OF_SUMS); }

#ifdef __AVX512F__
#define OF_MORE_ROWS(CALL) \
    OF_ROWS(7, CALL) OF_ROWS(8, CALL) OF_ROWS(9, CALL) OF_ROWS(10, CALL) OF_ROWS(11, CALL) OF_ROWS(12, CALL)
#else
#define OF_MORE_ROWS(CALL)
#endif
#define WITH_ROWS(rows, CALL) \
    switch (rows) { SIX_ROWS(CALL) OF_MORE_ROWS(CALL) }
