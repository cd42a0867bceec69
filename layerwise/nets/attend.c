/* Attention of few new tokens of many sequences whose keys and values lie in blocks of slots.

   Queries and keys are normed head by head where there are norms, and rotated, new keys and values go to their slots,
   and every head of every token attends to the slots that it sees, wherever their blocks lie: nothing is gathered.
   Softmax and sums are in float32. */

#include "native.h"

#include <omp.h>

enum { WIDEST = 512 };

/* to = x normed by `weight`, if any, and turned by the angles of one token; x and to hold `width` numbers. */
INLINE void turn(const Shape *a, const void *x, int64_t at, const float *weight, float eps, const void *cos,
                 const void *sin, int64_t token, float *to, int half) {
    const int64_t turning = a->turning, middle = turning / 2;
    float plain[WIDEST], squares = 0;
    for (int64_t i = 0; i < a->width; i++) plain[i] = get(x, at + i, half);
    if (weight) {
        for (int64_t i = 0; i < a->width; i++) squares += plain[i] * plain[i];
        const float inverse = 1 / sqrtf(squares / (float)a->width + eps);
        for (int64_t i = 0; i < a->width; i++) plain[i] *= inverse * weight[i];
    }
    for (int64_t i = 0; i < turning; i++)
        to[i] = plain[i] * get(cos, token * turning + i, half) +
                plain[i < middle ? i + middle : i - middle] * get(sin, token * turning + i, half);
    for (int64_t i = turning; i < a->width; i++) to[i] = plain[i];
}

/* One head of one token; `logits` has room for all slots of its sequence. */
INLINE void head(const Shape *a, const Places *p, const float *q, const void *k, const void *v, int64_t token,
                 int64_t kv_head, float *logits, void *out, int64_t out_at, int64_t width, int half) {
    const int64_t row = p->row[token], end = p->place[token] + 1, block = a->block;
    int64_t start = p->first[row] * block;
    if (a->window && end - a->window > start) start = end - a->window;
    const int64_t *table = p->table + row * p->columns - p->first[row];
    float most = -INFINITY, total = 0;
    for (int64_t s = start, some; s < end; s += some) { /* block by block */
        const int64_t in = s % block;
        some = block - in < end - s ? block - in : end - s;
        int64_t at = (kv_head * a->slots + table[s / block] * block + in) * width;
        for (int64_t j = s - start; j < s - start + some; j++, at += width) {
            floats sum[2] = {{0}};
            for (int64_t i = 0; i < width; i += 2 * LANES) {
                sum[0] += load_floats(q + i) * get_four(k, at + i, half);
                sum[1] += load_floats(q + i + LANES) * get_four(k, at + i + LANES, half);
            }
            float logit = sum_of(sum[0] + sum[1]) * a->scale;
            if (a->softcap != 0) logit = a->softcap * tanhf(logit / a->softcap);
            logits[j] = logit;
            most = logit > most ? logit : most;
        }
    }
    for (int64_t j = 0; j < end - start; j += LANES) {
        const int64_t some = end - start - j < LANES ? end - start - j : LANES;
        floats weight = {0};
        for (int i = 0; i < some; i++) weight[i] = logits[j + i] - most;
        weight = exp_of(weight);
        for (int i = 0; i < some; i++) {
            logits[j + i] = weight[i];
            total += weight[i];
        }
    }
    floats sum[WIDEST / LANES];
    for (int64_t i = 0; i < width / LANES; i++) sum[i] = (floats){0};
    for (int64_t s = start, some; s < end; s += some) {
        const int64_t in = s % block;
        some = block - in < end - s ? block - in : end - s;
        int64_t at = (kv_head * a->slots + table[s / block] * block + in) * width;
        for (int64_t j = s - start; j < s - start + some; j++, at += width)
            for (int64_t i = 0; i < width; i += LANES) sum[i / LANES] += logits[j] * get_four(v, at + i, half);
    }
    for (int64_t i = 0; i < width; i++) put(out, out_at + i, sum[i / LANES][i % LANES] / total, half);
}

INLINE int attend_in(const Shape *a, const Places *p, const HeadNorms *norms, int64_t tokens, const void *qkv,
                     const void *cos, const void *sin, void *k, void *v, void *out, int half, int threads) {
    const int64_t width = a->width, all = a->heads + 2 * a->kv_heads, group = a->heads / a->kv_heads;
    int64_t longest = 0;
    for (int64_t t = 0; t < tokens; t++) longest = p->place[t] >= longest ? p->place[t] + 1 : longest;
    const int64_t queries = tokens * a->heads * width;
    float *q = malloc((queries + threads * longest) * sizeof *q), turned[WIDEST];
    const float *q_norm = norms ? norms->q : NULL, *k_norm = norms ? norms->k : NULL, eps = norms ? norms->eps : 0;
    if (!q) return 1;
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t h = 0; h < a->heads; h++)
            turn(a, qkv, (t * all + h) * width, q_norm, eps, cos, sin, t, q + (t * a->heads + h) * width, half);
        for (int64_t h = 0; h < a->kv_heads; h++) {
            const int64_t to = (h * a->slots + p->slot[t]) * width, from = (t * all + a->heads + h) * width;
            turn(a, qkv, from, k_norm, eps, cos, sin, t, turned, half);
            for (int64_t i = 0; i < width; i++) {
                put(k, to + i, turned[i], half);
                put(v, to + i, get(qkv, from + a->kv_heads * width + i, half), half);
            }
        }
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < tokens * a->heads; i++) {
        float *logits = q + queries + omp_get_thread_num() * longest;
        const int64_t token = i / a->heads, kv_head = i % a->heads / group;
        if (width == 64) head(a, p, q + i * width, k, v, token, kv_head, logits, out, i * width, 64, half);
        else head(a, p, q + i * width, k, v, token, kv_head, logits, out, i * width, width, half);
    }
    free(q);
    return 0;
}

/* qkv [tokens, heads + 2 kv_heads, width], where width is a multiple of 8 and at most 512; cos, sin [tokens, turning];
   k, v [kv_heads, slots, width]; out [tokens, heads, width]. Gives 0, or 1 where memory ran out. */
int attend(const Shape *a, const Places *p, const HeadNorms *norms, int64_t tokens, const void *qkv, const void *cos,
           const void *sin, void *k, void *v, void *out, int half, int threads) {
    return half ? attend_in(a, p, norms, tokens, qkv, cos, sin, k, v, out, 1, threads)
                : attend_in(a, p, norms, tokens, qkv, cos, sin, k, v, out, 0, threads);
}
