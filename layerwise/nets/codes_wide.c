/* Outputs of few rows with a packed matrix by vectors of sixteen sums, for processors that add products of 16-bit numbers to
   them in one instruction. `codes.c` has them for others. */

#include "packed.h"

#ifdef __AVX512VNNI__

/* Inputs of two pieces; how many outputs ahead memory is fetched. */
enum { BOTH = 2 * PIECE, AHEAD = 8 };

/* Two pieces of nibbles: of both the even inputs, the first piece's before the second's, and then the odd ones. Where there
   is no second piece its codes are zero. */
INLINE void nibbles_of(const uint8_t *codes, int pieces, __m512i *even, __m512i *odd) {
    const __m256i stored = pieces == 2 ? _mm256_loadu_si256((const void *)codes)
                                       : _mm256_zextsi128_si256(_mm_loadu_si128((const void *)codes));
    const __m512i both = _mm512_cvtepu8_epi16(stored);
    *even = _mm512_and_si512(both, _mm512_set1_epi16(15));
    *odd = _mm512_srli_epi16(both, 4);
}

INLINE __m512i bytes_of(const uint8_t *codes, int kind) {
    const __m256i stored = _mm256_loadu_si256((const void *)codes);
    return kind == BYTES ? _mm512_cvtepu8_epi16(stored) : _mm512_cvtepi8_epi16(stored);
}

INLINE __m512i plus_pairs(__m512i sum, __m512i codes, const int16_t *x) {
    return _mm512_dpwssd_epi32(sum, codes, _mm512_load_si512(x));
}

INLINE __m512 plus_sums(__m512 total, __m512i sums, __m512 factor) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), factor, total);
}

/* Adds to `total` what two groups of one piece each give, the second where there is one. */
INLINE void add_pieces(const uint8_t *codes, const int16_t *x, int64_t apart, int rows, int pieces,
                       float factor[MOST_ROWS][CHUNK], int64_t j, __m512 *total) {
    __m512i even, odd;
    nibbles_of(codes, pieces, &even, &odd);
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++) {
        const __m512i sums = plus_pairs(plus_pairs(_mm512_setzero_si512(), even, x + m * apart), odd, x + m * apart + PIECE);
        const __m512 first = _mm512_set1_ps(factor[m][j]);
        total[m] = plus_sums(total[m], sums, _mm512_mask_mov_ps(first, 0xff00, _mm512_set1_ps(factor[m][j + 1])));
    }
}

/* Adds to `total` what one group gives: of nibbles in pairs of pieces, or of bytes. */
INLINE void add_group(const uint8_t *codes, const int16_t *x, int64_t apart, int64_t group, int rows, int kind,
                      float factor[MOST_ROWS][CHUNK], int64_t j, __m512 *total) {
    __m512i sums[MOST_ROWS];
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++) sums[m] = _mm512_setzero_si512();
    if (kind == NIBBLES)
        for (int64_t i = 0; i < group; i += BOTH, codes += PIECE, x += BOTH) {
            __m512i even, odd;
            nibbles_of(codes, 2, &even, &odd);
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++)
                sums[m] = plus_pairs(plus_pairs(sums[m], even, x + m * apart), odd, x + m * apart + PIECE);
        }
    else
        for (int64_t i = 0; i < group; i += PIECE, codes += PIECE, x += PIECE) {
            const __m512i some = bytes_of(codes, kind);
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++) sums[m] = plus_pairs(sums[m], some, x + m * apart);
        }
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++) total[m] = plus_sums(total[m], sums[m], _mm512_set1_ps(factor[m][j]));
}

/* Scales or zeros of `count` groups; zeros where there are none. */
INLINE __m512 scales_of(const bf16 *from, int64_t count) {
    if (!from) return _mm512_setzero_ps();
    const __m256i some = _mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(some), 16));
}

/* One output of `rows` rows; `rows`, `kind` and a group of one piece are constants where it is used. */
INLINE void output(const Matrix *w, int64_t o, int rows, Fixed x, float *y, int kind, int64_t group) {
    const int64_t groups = x.groups, stored = kind == NIBBLES ? group / 2 : group;
    const uint8_t *codes = w->codes + o * groups * stored;
    const bf16 *scales = w->scale + o * groups, *zeros = w->zero ? w->zero + o * groups : NULL;
    for (int64_t i = 0; i < groups * stored; i += LINE) __builtin_prefetch(codes + AHEAD * groups * stored + i);
    __builtin_prefetch(scales + AHEAD * groups);
    __builtin_prefetch(zeros + AHEAD * groups);
    const __m512 middle = _mm512_set1_ps(kind == NIBBLES ? 8 : kind == BYTES ? 128 : 0);
    __m512 total[MOST_ROWS];
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++) total[m] = _mm512_setzero_ps();
    for (int64_t first = 0; first < groups; first += CHUNK, codes += CHUNK * stored) {
        const int64_t count = groups - first < CHUNK ? groups - first : CHUNK;
        const __m512 scale = scales_of(scales + first, count), zero = scales_of(zeros ? zeros + first : NULL, count);
        const __m512 shift = _mm512_fnmadd_ps(middle, scale, zero);
        const int16_t *fixed = x.fixed + first * group;
        float factor[MOST_ROWS][CHUNK] __attribute__((aligned(LINE)));
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) {
            const int64_t at = m * x.whole + first;
            _mm512_store_ps(factor[m], _mm512_mul_ps(scale, _mm512_load_ps(x.step + at)));
            total[m] = _mm512_fmadd_ps(shift, _mm512_load_ps(x.sum + at), total[m]);
        }
        if (kind == NIBBLES && group == PIECE) {
            int64_t j = 0;
            for (; j + 2 <= count; j += 2)
                add_pieces(codes + j * HALF, fixed + j * PIECE, x.apart, rows, 2, factor, j, total);
            if (j < count) add_pieces(codes + j * HALF, fixed + j * PIECE, x.apart, rows, 1, factor, j, total);
        } else
            for (int64_t j = 0; j < count; j++)
                add_group(codes + j * stored, fixed + j * group, x.apart, group, rows, kind, factor, j, total);
    }
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++) y[m] = _mm512_reduce_add_ps(total[m]);
}

#include "outputs.h"

void lay_out_nibbles(const int16_t *in_order, int64_t first, int64_t group, int16_t *row) {
    for (int64_t p = 0; p < group; p += PIECE) {
        int16_t *even = row + (first + p) / BOTH * BOTH + (first + p) / PIECE % 2 * HALF;
        for (int i = 0; i < HALF; i++) even[i] = in_order[p + 2 * i], even[PIECE + i] = in_order[p + 2 * i + 1];
    }
}

/* Sixteen codes, less the middle: from eight bytes of nibbles, or from as many bytes. */
INLINE __m512 sixteen(const uint8_t *codes, int kind) {
    if (kind == SIGNED_BYTES) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)codes)));
    __m128i some;
    if (kind == NIBBLES) {
        const __m128i both = _mm_loadl_epi64((const void *)codes), low = _mm_set1_epi8(15);
        some = _mm_unpacklo_epi8(_mm_and_si128(both, low), _mm_and_si128(_mm_srli_epi16(both, 4), low));
    } else some = _mm_loadu_si128((const void *)codes);
    return _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(some)), _mm512_set1_ps(kind == NIBBLES ? 8 : 128));
}

void numbers_of(const Matrix *w, int64_t o, int64_t g, float *to) {
    const int64_t group = w->group, at = o * (w->inputs / group) + g;
    const __m512 scale = _mm512_set1_ps(widened(w->scale[at]));
    const __m512 zero = _mm512_set1_ps(w->zero ? widened(w->zero[at]) : 0);
    const uint8_t *codes = w->codes + (w->kind == NIBBLES ? at * group / 2 : at * group);
    for (int64_t i = 0; i < group; i += 16) {
        const __m512 some = w->kind == NIBBLES ? sixteen(codes + i / 2, NIBBLES)
                            : w->kind == BYTES ? sixteen(codes + i, BYTES) : sixteen(codes + i, SIGNED_BYTES);
        _mm512_storeu_ps(to + i, _mm512_add_ps(_mm512_mul_ps(some, scale), zero)); /* rounded twice, as torch does */
    }
}

#endif
