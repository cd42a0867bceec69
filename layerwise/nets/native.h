/* What the compiled functions share: vectors of eight numbers, and numbers that come and go as float32 or bfloat16. */

#pragma once

#ifdef __SSE__
#include <immintrin.h>
#endif
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;
typedef float many __attribute__((vector_size(32)));
typedef float loose_many __attribute__((vector_size(32), aligned(4)));
typedef int32_t many_ints __attribute__((vector_size(32)));
typedef uint16_t loose_many_bf16 __attribute__((vector_size(16), aligned(2)));

enum { MANY = 8, LINE = 64 };
#define INLINE static inline __attribute__((always_inline))

INLINE size_t lines(size_t bytes) { return (bytes + LINE - 1) / LINE * LINE; }

INLINE float widened(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE bf16 narrowed(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return 0x7fc0;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

INLINE float get(const void *x, int64_t i, int half) {
    return half ? widened(((const bf16 *)x)[i]) : ((const float *)x)[i];
}

INLINE void put(void *y, int64_t i, float value, int half) {
    if (half) ((bf16 *)y)[i] = narrowed(value);
    else ((float *)y)[i] = value;
}

INLINE many load_many_bf16(const bf16 *from) {
    return (many)(__builtin_convertvector(*(const loose_many_bf16 *)from, many_ints) << 16);
}

INLINE many load_many(const float *from) { return *(const loose_many *)from; }

INLINE many get_many(const void *x, int64_t i, int half) {
    return half ? load_many_bf16((const bf16 *)x + i) : load_many((const float *)x + i);
}

INLINE void put_many(void *y, int64_t i, many value, int half) {
    if (!half) {
        *(loose_many *)((float *)y + i) = value;
        return;
    }
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
    _mm_storeu_si128((void *)((bf16 *)y + i), (__m128i)_mm256_cvtneps_pbh((__m256)value));
    return;
#endif
    const many_ints bits = (many_ints)value, none = value != value;
    const many_ints rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16 & 0xffff;
    *(loose_many_bf16 *)((bf16 *)y + i) =
        __builtin_convertvector((rounded & ~none) | (none & 0x7fc0), loose_many_bf16);
}

/* Number i of x on its way into the cache; i may lie beyond the end. */
INLINE void fetch(const void *x, int64_t i, int half) { __builtin_prefetch((const char *)x + i * (half ? 2 : 4)); }

INLINE float sum_of_many(many x) { /* ((0 + 4) + (1 + 5)) + ((2 + 6) + (3 + 7)) */
#ifdef __AVX__
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehdup_ps(four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehl_ps(two, two)));
#else
    return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7]));
#endif
}

INLINE float most_of_many(many x) {
#ifdef __AVX__
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehdup_ps(four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehl_ps(two, two)));
#else
    float most = x[0];
    for (int i = 1; i < MANY; i++) most = x[i] > most ? x[i] : most;
    return most;
#endif
}

/* sum + a * b, rounded once where the processor can. */
INLINE many plus_product(many sum, many a, many b) {
#ifdef __FMA__
    return (many)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    return sum + a * b;
#endif
}

/* exp x, its relative error below 3e-7; 0 or infinity where float32 has no number for it. */
INLINE many exp_of(many x) {
    const many_ints low = x < -87.3f, high = x > 88.7f;
    const many turns = (x * 1.44269504f + 12582912.0f) - 12582912.0f; /* to the nearest whole number */
    const many r = x - turns * 0.693359375f + turns * 2.12194440e-4f;
    many p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const many_ints two_to = (__builtin_convertvector(turns, many_ints) + 127) << 23;
    const many value = p * (many)two_to;
    return (many)(((many_ints)value & ~low & ~high) | (high & 0x7f800000));
}

#ifdef __AVX512DQ__

static const float LOG2_OF_E = 1.44269504f;

/* 2^x, its relative error below 2e-7, and exactly 1 for 0; 0 where float32 has no number for it. */
INLINE __m512 two_to(__m512 x) {
    const __m512 part = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
    __m512 p = _mm512_set1_ps(1.86713052e-3f);
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(9.01702978e-3f));
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(5.57999127e-2f));
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(0.240164444f));
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(0.693151295f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(p, part, _mm512_set1_ps(1)), x); /* by the whole number below x */
}

#endif

enum { NIBBLES = 4, BYTES = 8, SIGNED_BYTES = -8, BFLOAT16 = 16, FLOAT16 = -16 };

/* Codes with scales, or, where `kind` is BFLOAT16 or FLOAT16, the numbers themselves. */
typedef struct {
    const uint8_t *codes;
    const bf16 *scale, *zero; /* [outputs, inputs / group]; no zeros where the format is symmetric */
    int64_t outputs, inputs, group, kind;
} Matrix;

/* Matrices that read the same input, their outputs side by side; places that are not needed hold NULL. */
typedef struct {
    const Matrix *parts[3];
    const float *bias[3];
} Joined;

typedef struct {
    const float *q, *k; /* [width]; the norm of every head of queries and of keys */
    float eps;
} HeadNorms;

typedef struct {
    int64_t heads, kv_heads, width, turning; /* of `width` channels the first `turning` rotate */
    int64_t slots, block, window;            /* of a pool, of a block, seen at most; window 0: all */
    float scale, softcap;                    /* softcap 0: none */
} Shape;

/* How keys and values are kept: as numbers, [kv_heads, slots, width], or as codes, to which `Codes` points. */
enum { KEPT_FLOAT32, KEPT_BFLOAT16, KEPT_INT8, KEPT_INT4 };

/* 8 bits: a byte for each number, [kv_heads, slots, width], and a scale for each head of a slot. 4 bits: numbers i and
   i + width / 2 in a byte; the least number and the step of each group, a largest power of two up to 32 that divides the
   width. */
typedef struct {
    uint8_t *codes;
    void *scale; /* float32, or of 4 bits the least number, bfloat16 */
    bf16 *step;  /* of 4 bits only */
} Codes;

typedef struct {
    const int64_t *slot;  /* [tokens]: where the token's key goes in the pool */
    const int64_t *row;   /* [tokens]: the sequence that it belongs to */
    const int64_t *place; /* [tokens]: its place among the slots of its sequence */
    const int64_t *order; /* [tokens]: all tokens, those of sequences that begin with the same blocks side by side */
    const int64_t *first; /* [sequences]: the block that the first column of the table stands for */
    const int64_t *table; /* [sequences, columns]: blocks of the pool */
    int64_t columns;
} Places;

enum { SILU, GELU_TANH };

/* As many of those that are left, `most` at most, that all parts are about as large. */
INLINE int even_part(int64_t left, int64_t most) {
    const int64_t parts = (left + most - 1) / most;
    return (int)((left + parts - 1) / parts);
}

/* CALL with a number of rows as a constant. */
#define OF_ROWS(n, CALL) \
    case n: CALL(n); break;
#define SIX_ROWS(CALL) \
    OF_ROWS(1, CALL) OF_ROWS(2, CALL) OF_ROWS(3, CALL) OF_ROWS(4, CALL) OF_ROWS(5, CALL) OF_ROWS(6, CALL)

enum { WIDEST = 512 }; /* channels of a head at most */

enum { MANY_NUMBERS = 1 << 13 }; /* from which several threads are worth waking, where each is little work */

/* to = x normed by `weight`, if any, and turned by the angles of one token; x and to hold `width` numbers. */
INLINE void turn(const Shape *a, const void *x, int64_t at, const float *weight, float eps, const void *cos,
                 const void *sin, int64_t token, float *to, int half) {
    const int64_t middle = a->turning / 2, angle = token * a->turning;
    float plain[WIDEST], squares = 0;
    for (int64_t i = 0; i < a->width; i++) plain[i] = get(x, at + i, half);
    if (weight) {
        for (int64_t i = 0; i < a->width; i++) squares += plain[i] * plain[i];
        const float inverse = 1 / sqrtf(squares / (float)a->width + eps);
        for (int64_t i = 0; i < a->width; i++) plain[i] *= inverse * weight[i];
    }
    for (int64_t i = 0; i < middle; i++)
        to[i] = plain[i] * get(cos, angle + i, half) + plain[i + middle] * get(sin, angle + i, half);
    for (int64_t i = middle; i < 2 * middle; i++)
        to[i] = plain[i] * get(cos, angle + i, half) + plain[i - middle] * get(sin, angle + i, half);
    for (int64_t i = a->turning; i < a->width; i++) to[i] = plain[i];
}

int packed_product(const Matrix *w, const void *x, int64_t rows, const float *bias, void *y, int64_t stride, int half,
                   int threads);
int packed_rows(const Matrix *w, const int64_t *chosen, int64_t rows, float *y);
void packed_numbers(const Matrix *w, int64_t from, int64_t to, void *y, int half, int threads);
int dense_product(const Matrix *w, const void *x, int64_t rows, const float *bias, void *y, int64_t stride, int half,
                  int threads);
int multiplies_pairs(void);
int pairs_product(const Matrix *w, const bf16 *x, int64_t rows, const float *bias, bf16 *y, int64_t stride, int threads);
int panel_product(const Matrix *w, const float *x, int64_t rows, const float *bias, float *y, int64_t stride,
                  int threads);
int unit_multiplies(int64_t outputs, int64_t inputs);
int unit_product(const Joined *w, const bf16 *x, int64_t rows, bf16 *y, int64_t stride, int threads);
void rms_norm(const void *x, const float *weight, int64_t rows, int64_t width, float eps, void *y, int half,
              int threads);
void gate_times(const void *x, int64_t rows, int64_t width, void *y, int activation, int half, int threads);
int attend(const Shape *a, const Places *p, const HeadNorms *norms, int64_t tokens, const void *qkv, const void *cos,
           const void *sin, void *k, void *v, void *out, int half, int kept, int threads);
int unit_attends(const Shape *a);
int unit_attend(const Shape *a, const Places *p, const HeadNorms *norms, int64_t tokens, const bf16 *qkv,
                const void *cos, const void *sin, bf16 *k, bf16 *v, bf16 *out, int threads);
