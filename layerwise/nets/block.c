/* A whole block for few tokens: x + attention(norm x), then x + down(silu(gate(norm x)) * up(norm x)). */

#include "native.h"

typedef struct {
    const Matrix *qkv, *o, *gate_up, *down;
    const float *qkv_bias, *o_bias, *attention_norm, *feed_forward_norm;
    int64_t hidden, inner;
    float attention_eps, feed_forward_eps;
} Block;

static void add(const void *x, const void *y, int64_t count, void *to, int half) {
    if (half)
        for (int64_t i = 0; i < count; i++) put(to, i, get(x, i, 1) + get(y, i, 1), 1);
    else
        for (int64_t i = 0; i < count; i++) put(to, i, get(x, i, 0) + get(y, i, 0), 0);
}

/* x, y [tokens, hidden]; the rest as in `attend`. Gives 0, or 1 where memory ran out. */
int block_step(const Block *b, const Shape *a, const Places *p, int64_t tokens, const void *x, const void *cos,
               const void *sin, void *k, void *v, void *y, int half, int threads) {
    const int64_t hidden = b->hidden, heads = a->heads * a->width, all = heads + 2 * a->kv_heads * a->width;
    const int64_t size = half ? 2 : 4, wide = all > 2 * b->inner ? all : 2 * b->inner;
    const int64_t narrow = heads > b->inner ? heads : b->inner;
    char *normed = malloc(tokens * (hidden + wide + narrow) * size);
    if (!normed) return 1;
    char *joined = normed + tokens * hidden * size, *mixed = joined + tokens * wide * size;
    rms_norm(x, b->attention_norm, tokens, hidden, b->attention_eps, normed, half);
    int failed = packed_product(b->qkv, normed, tokens, b->qkv_bias, joined, half, threads);
    failed |= attend(a, p, tokens, joined, cos, sin, k, v, mixed, half, threads);
    failed |= packed_product(b->o, mixed, tokens, b->o_bias, normed, half, threads);
    add(x, normed, tokens * hidden, y, half);
    rms_norm(y, b->feed_forward_norm, tokens, hidden, b->feed_forward_eps, normed, half);
    failed |= packed_product(b->gate_up, normed, tokens, NULL, joined, half, threads);
    silu_times(joined, tokens, b->inner, mixed, half);
    failed |= packed_product(b->down, mixed, tokens, NULL, normed, half, threads);
    add(y, normed, tokens * hidden, y, half);
    free(normed);
    return failed;
}
