/* What functions for processors that multiply pairs of bfloat16 share, and those for a matrix unit (AMX). */

#pragma once

#include "native.h"

#ifdef __AVX512BF16__

enum { LANES = 16 }; /* numbers of 32 bits in a vector */

INLINE __m512 values_from(const bf16 *x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)x)), 16));
}

INLINE void store_narrow(bf16 *to, __m512 x) { _mm256_storeu_si256((void *)to, (__m256i)_mm512_cvtneps_pbh(x)); }

/* Sixteen rows of sixteen numbers of 32 bits become columns. */
INLINE void turned_over(const bf16 *const rows[LANES], int64_t at, __m512i *to) {
    __m512i x[LANES], y[LANES];
    for (int i = 0; i < LANES; i++) x[i] = _mm512_loadu_si512(rows[i] + at);
    for (int i = 0; i < LANES; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        const __m512i a = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88), b = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
        to[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        to[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
        to[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
        to[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

#endif

#if defined(__AVX512BF16__) && defined(__AMX_BF16__) && defined(__linux__)
#define MATRIX_UNIT

/* Rows of a tile, its inputs, its numbers, and bytes of its rows. */
enum { SIDE = 16, DEEP = 32, NUMBERS = SIDE * DEEP, ACROSS = 64 };

typedef struct {
    uint8_t palette, start, none[14];
    uint16_t across[SIDE];
    uint8_t down[SIDE];
} Tiles;

static const Tiles WHOLE = {.palette = 1, .across = {64, 64, 64, 64, 64, 64, 64, 64},
                            .down = {16, 16, 16, 16, 16, 16, 16, 16}};

/* All that was written is there: loads of tiles do not tell the compiler that they read memory. */
INLINE void settle(void) { __asm__ volatile("" : : : "memory"); }

/* Sixteen rows, `apart`, become columns; where there are only `count`, the last stands for the rest. */
INLINE void turn_rows(const bf16 *rows, int64_t apart, int64_t count, int64_t inputs, bf16 *columns) {
    const bf16 *of[SIDE];
    for (int i = 0; i < SIDE; i++) of[i] = rows + (i < count ? i : count - 1) * apart;
    for (int64_t i = 0; i < inputs; i += DEEP) turned_over(of, i, (__m512i *)(columns + i * SIDE));
}

#endif
