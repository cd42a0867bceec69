/* Attention of few new tokens of many sequences whose keys and values lie in blocks of slots.

   Queries and keys are normed head by head where there are norms, and rotated, new keys and values go to their slots,
   and every head of every token attends to the slots that it sees, wherever their blocks lie: nothing is gathered.
   Softmax and sums are in float32. */

#include "native.h"

#include <omp.h>

/* Heads that read a key together, channels of values summed at a time, and how many slots
   ahead keys and values are fetched. */
enum { HEADS_AT_ONCE = 4, CUT = 4 * MANY, AHEAD = 16 };

/* The slots that a token's heads see of the keys of one head, and room for as many logits of every head. */
typedef struct {
    const Shape *shape;
    const int64_t *table;
    int64_t kv_head, start, end, room;
    float *logits;
} Seen;

/* How many slots from `s` on lie one behind the other, at most those seen, and where in the pool the first one lies. */
INLINE int64_t run_of(const Seen *seen, int64_t s, int64_t width, int64_t *at) {
    const Shape *a = seen->shape;
    const int64_t in = s % a->block, left = a->block - in;
    *at = (seen->kv_head * a->slots + seen->table[s / a->block] * a->block + in) * width;
    return left < seen->end - s ? left : seen->end - s;
}

/* What the numbers of each of MANY vectors sum up to. */
INLINE many sums_of(const many x[MANY]) {
#ifdef __AVX__
    __m256 pairs[MANY / 2], fours[2];
    for (int i = 0; i < MANY / 2; i++) pairs[i] = _mm256_hadd_ps((__m256)x[2 * i], (__m256)x[2 * i + 1]);
    for (int i = 0; i < 2; i++) fours[i] = _mm256_hadd_ps(pairs[2 * i], pairs[2 * i + 1]);
    return (many)_mm256_permute2f128_ps(fours[0], fours[1], 0x20) +
           (many)_mm256_permute2f128_ps(fours[0], fours[1], 0x31);
#else
    many sums;
    for (int i = 0; i < MANY; i++) sums[i] = sum_of_many(x[i]);
    return sums;
#endif
}

/* The logits of `count` heads. */
INLINE void logits_of(const Seen *seen, const float *q, const void *k, int count, int64_t width, int kept) {
    for (int64_t s = seen->start, some, at; s < seen->end; s += some) {
        some = run_of(seen, s, width, &at);
        some = some < MANY ? some : MANY;
        for (int h = 0; h < count; h++) {
            many sum[MANY] = {{0}};
            for (int64_t j = 0; j < some; j++) {
                many one = {0};
                for (int64_t i = 0; i < width; i += MANY) {
                    if (h == 0) fetch(k, at + (j + AHEAD) * width + i, kept);
                    one = plus_product(one, load_many(q + h * width + i), get_many(k, at + j * width + i, kept));
                }
                sum[j] = one;
            }
            const many found = sums_of(sum) * seen->shape->scale;
            memcpy(seen->logits + h * seen->room + s - seen->start, &found, some * sizeof(float));
        }
    }
}

/* The logits of one head to weights; gives what they sum up to. There is room for whole vectors. */
static float weights_of(float *logits, int64_t slots, float softcap) {
    float most = -INFINITY;
    for (int64_t j = 0; j < slots; j++) {
        if (softcap != 0) logits[j] = softcap * tanhf(logits[j] / softcap);
        most = logits[j] > most ? logits[j] : most;
    }
    for (int64_t j = slots; j % MANY; j++) logits[j] = -INFINITY;
    many sum = {0};
    for (int64_t j = 0; j < slots; j += MANY) {
        const many weight = exp_of(load_many(logits + j) - most);
        memcpy(logits + j, &weight, sizeof weight);
        sum += weight;
    }
    return sum_of_many(sum);
}

/* What `count` heads read of the channels from `first` on, `vectors` times MANY of them. */
INLINE void values_of(const Seen *seen, const void *v, int count, int64_t first, int vectors,
                      many sum[HEADS_AT_ONCE][CUT / MANY], int64_t width, int kept) {
    for (int64_t s = seen->start, some, at; s < seen->end; s += some) {
        some = run_of(seen, s, width, &at);
        at += first;
        const float *weights = seen->logits + s - seen->start;
        for (int64_t j = 0; j < some; j++, at += width)
#pragma GCC unroll 4
            for (int i = 0; i < vectors; i++) {
                fetch(v, at + AHEAD * width + i * MANY, kept);
                const many value = get_many(v, at + i * MANY, kept);
#pragma GCC unroll 4
                for (int h = 0; h < count; h++)
                    sum[h][i] = plus_product(sum[h][i], (many){0} + weights[h * seen->room + j], value);
            }
    }
}

/* `count` heads of one token that read the same keys. */
INLINE void heads_of(const Seen *seen, const float *q, const void *k, const void *v, int count, void *out,
                     int64_t out_at, int64_t width, int half, int kept) {
    float total[HEADS_AT_ONCE];
    logits_of(seen, q, k, count, width, kept);
    for (int h = 0; h < count; h++)
        total[h] = weights_of(seen->logits + h * seen->room, seen->end - seen->start, seen->shape->softcap);
    for (int64_t first = 0; first < width; first += CUT) {
        many sum[HEADS_AT_ONCE][CUT / MANY] = {{{0}}};
        const int vectors = width - first < CUT ? (int)(width - first) / MANY : CUT / MANY;
        if (vectors == CUT / MANY) values_of(seen, v, count, first, CUT / MANY, sum, width, kept);
        else values_of(seen, v, count, first, vectors, sum, width, kept);
        for (int h = 0; h < count; h++)
            for (int i = 0; i < vectors * MANY; i++)
                put(out, out_at + h * width + first + i, sum[h][i / MANY][i % MANY] / total[h], half);
    }
}

/* The same; `count` is a constant where it is used. */
INLINE void some_heads(const Seen *seen, const float *q, const void *k, const void *v, int count, void *out,
                       int64_t out_at, int64_t width, int half, int kept) {
    if (count == 1) heads_of(seen, q, k, v, 1, out, out_at, width, half, kept);
    else if (count == 2) heads_of(seen, q, k, v, 2, out, out_at, width, half, kept);
    else if (count == 3) heads_of(seen, q, k, v, 3, out, out_at, width, half, kept);
    else heads_of(seen, q, k, v, HEADS_AT_ONCE, out, out_at, width, half, kept);
}

/* What a token sees with the heads that read `kv_head`. */
INLINE Seen seen_by(const Shape *a, const Places *p, int64_t token, int64_t kv_head, int64_t room, float *logits) {
    const int64_t row = p->row[token], end = p->place[token] + 1, kept = p->first[row] * a->block;
    const int64_t start = a->window && end - a->window > kept ? end - a->window : kept;
    return (Seen){a, p->table + row * p->columns - p->first[row], kv_head, start, end, room, logits};
}

INLINE int attend_in(const Shape *a, const Places *p, const HeadNorms *norms, int64_t tokens, const void *qkv,
                     const void *cos, const void *sin, void *k, void *v, void *out, int half, int kept,
                     int threads) {
    const int64_t width = a->width, all = a->heads + 2 * a->kv_heads, group = a->heads / a->kv_heads;
    int64_t longest = 0;
    for (int64_t t = 0; t < tokens; t++) longest = p->place[t] >= longest ? p->place[t] + 1 : longest;
    const int64_t queries = tokens * a->heads * width, room = (longest + MANY - 1) / MANY * MANY;
    float *q = malloc((queries + threads * HEADS_AT_ONCE * room) * sizeof *q), turned[WIDEST];
    const float *q_norm = norms ? norms->q : NULL, *k_norm = norms ? norms->k : NULL, eps = norms ? norms->eps : 0;
    if (!q) return 1;
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t h = 0; h < a->heads; h++)
            turn(a, qkv, (t * all + h) * width, q_norm, eps, cos, sin, t, q + (t * a->heads + h) * width, half);
        for (int64_t h = 0; h < a->kv_heads; h++) {
            const int64_t to = (h * a->slots + p->slot[t]) * width, from = (t * all + a->heads + h) * width;
            turn(a, qkv, from, k_norm, eps, cos, sin, t, turned, half);
            for (int64_t i = 0; i < width; i++) {
                put(k, to + i, turned[i], kept);
                put(v, to + i, get(qkv, from + a->kv_heads * width + i, half), kept);
            }
        }
    }
    const int64_t parts = (group + HEADS_AT_ONCE - 1) / HEADS_AT_ONCE, of_token = a->kv_heads * parts;
    /* A head of all tokens before the next head: sequences with a common prefix share its slots. */
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < tokens * of_token; i++) {
        float *logits = q + queries + omp_get_thread_num() * HEADS_AT_ONCE * room;
        const int64_t token = i % tokens, part = i / tokens;
        const int64_t kv_head = part / parts, first = part % parts * HEADS_AT_ONCE;
        const int64_t at = (token * a->heads + kv_head * group + first) * width;
        const int count = group - first < HEADS_AT_ONCE ? (int)(group - first) : HEADS_AT_ONCE;
        const Seen seen = seen_by(a, p, token, kv_head, room, logits);
        if (width == 64) some_heads(&seen, q + at, k, v, count, out, at, 64, half, kept);
        else some_heads(&seen, q + at, k, v, count, out, at, width, half, kept);
    }
    free(q);
    return 0;
}

/* qkv [tokens, heads + 2 kv_heads, width], where width is a multiple of 8, of codes one of COLUMNS, and at most 512; cos, sin [tokens, turning];
   k, v as `kept` says, never float32 where all else is bfloat16; out [tokens, heads, width].
   Gives 0, or 1 where memory ran out. */
int attend(const Shape *a, const Places *p, const HeadNorms *norms, int64_t tokens, const void *qkv, const void *cos,
           const void *sin, void *k, void *v, void *out, int half, int kept, int threads) {
    if (kept >= KEPT_INT8) return panel_attend(a, p, norms, tokens, qkv, cos, sin, k, v, out, half, kept, threads);
    if (half && unit_attends(a)) return unit_attend(a, p, norms, tokens, qkv, cos, sin, k, v, out, threads);
    if (half && tiles(a)) return attend_tiles(a, p, norms, tokens, qkv, cos, sin, k, v, out, threads);
    if (panel_attends(a)) return panel_attend(a, p, norms, tokens, qkv, cos, sin, k, v, out, half, kept, threads);
    if (half) return attend_in(a, p, norms, tokens, qkv, cos, sin, k, v, out, 1, 1, threads);
    if (kept) return attend_in(a, p, norms, tokens, qkv, cos, sin, k, v, out, 0, 1, threads);
    return attend_in(a, p, norms, tokens, qkv, cos, sin, k, v, out, 0, 0, threads);
}
