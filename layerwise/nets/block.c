/* A whole block for few tokens, or for any number where all products take many rows: x + attention(norm x), then
   x + down(activation(gate(norm x)) * up(norm x)); what a half writes is normed once more where the block has norms behind
   its halves. */

#include "native.h"

typedef struct {
    Joined qkv, gate_up;
    const Matrix *o, *down;
    const float *o_bias, *attention_norm, *feed_forward_norm, *attention_post, *feed_forward_post; /* post: or NULL */
    const HeadNorms *heads;
    int64_t hidden, inner, activation;
    float eps;
} Block;

/* Dense matrices are there in streams of float32, and where pairs of bfloat16 can be multiplied. */
static int product(const Matrix *w, const void *x, int64_t rows, const float *bias, void *y, int64_t stride, int half,
                   int threads) {
    if (w->kind == BFLOAT16 || w->kind == FLOAT16) return dense_product(w, x, rows, bias, y, stride, half, threads);
    return packed_product(w, x, rows, bias, y, stride, half, threads);
}

static int joined_product(const Joined *w, const void *x, int64_t rows, char *y, int half, int threads) {
    int64_t stride = 0;
    int unit = half;
    for (int i = 0; i < 3 && w->parts[i]; i++) {
        stride += w->parts[i]->outputs;
        unit = unit && w->parts[i]->kind == BFLOAT16 && unit_multiplies(w->parts[i]->outputs, w->parts[i]->inputs);
    }
    if (unit) return unit_product(w, x, rows, (bf16 *)y, stride, threads);
    int failed = 0;
    for (int i = 0; i < 3 && w->parts[i]; y += w->parts[i++]->outputs * (half ? 2 : 4))
        failed |= product(w->parts[i], x, rows, w->bias[i], y, stride, half, threads);
    return failed;
}

INLINE void add_in(const void *x, const void *y, int64_t numbers, void *to, int half, int threads) {
    const int64_t whole = numbers / MANY * MANY;
#pragma omp parallel for num_threads(threads) if (numbers > MANY_NUMBERS)
    for (int64_t i = 0; i < whole; i += MANY) put_many(to, i, get_many(x, i, half) + get_many(y, i, half), half);
    for (int64_t i = whole; i < numbers; i++) put(to, i, get(x, i, half) + get(y, i, half), half);
}

/* to = x + y, y normed first where there is a norm for it; `to` may be x, and y is lost. */
static void add(const void *x, void *y, const float *norm, float eps, int64_t rows, int64_t width, void *to, int half,
                int threads) {
    if (norm) rms_norm(y, norm, rows, width, eps, y, half, threads);
    if (half) add_in(x, y, rows * width, to, 1, threads);
    else add_in(x, y, rows * width, to, 0, threads);
}

/* Some of the tokens, in ascending order. */
typedef struct {
    const int64_t *tokens;
    int64_t count;
} Wanted;

/* Rows of `size` bytes one behind the other; `to` may be `from`. */
static void gather(const char *from, const Wanted *wanted, int64_t size, char *to) {
    for (int64_t i = 0; i < wanted->count; i++) memmove(to + i * size, from + wanted->tokens[i] * size, size);
}

static void scatter(const char *from, const Wanted *wanted, int64_t size, char *to) {
    for (int64_t i = 0; i < wanted->count; i++) memcpy(to + wanted->tokens[i] * size, from + i * size, size);
}

/* x, y [tokens, hidden], which may be the same; of tokens that are not `wanted` y is x, where it is not NULL, and of the block
   only keys and values are made; the rest as in `attend`. Gives 0, or 1 where memory ran out. */
static int block_step(const Block *b, const Shape *a, const Places *p, int64_t tokens, const Wanted *wanted, const void *x,
                      const void *cos, const void *sin, void *k, void *v, void *y, int half, int kept, int threads) {
    const int64_t hidden = b->hidden, heads = a->heads * a->width, all = heads + 2 * a->kv_heads * a->width;
    const int64_t size = half ? 2 : 4, wide = all > 2 * b->inner ? all : 2 * b->inner;
    const int64_t narrow = heads > b->inner ? heads : b->inner;
    char *normed = malloc((tokens * (hidden + wide + narrow) + (wanted ? wanted->count * hidden : 0)) * size);
    if (!normed) return 1;
    char *joined = normed + tokens * hidden * size, *mixed = joined + tokens * wide * size, *to = y;
    rms_norm(x, b->attention_norm, tokens, hidden, b->eps, normed, half, threads);
    int failed = joined_product(&b->qkv, normed, tokens, joined, half, threads);
    failed |= attend(a, p, b->heads, tokens, joined, cos, sin, k, v, mixed, half, kept, threads);
    if (wanted) {
        if (x != y) memcpy(y, x, tokens * hidden * size);
        to = mixed + tokens * narrow * size, tokens = wanted->count;
        gather(x, wanted, hidden * size, to), gather(mixed, wanted, heads * size, mixed);
        x = to;
    }
    if (tokens) {
        failed |= product(b->o, mixed, tokens, b->o_bias, normed, hidden, half, threads);
        add(x, normed, b->attention_post, b->eps, tokens, hidden, to, half, threads);
        rms_norm(to, b->feed_forward_norm, tokens, hidden, b->eps, normed, half, threads);
        failed |= joined_product(&b->gate_up, normed, tokens, joined, half, threads);
        gate_times(joined, tokens, b->inner, mixed, (int)b->activation, half, threads);
        failed |= product(b->down, mixed, tokens, NULL, normed, hidden, half, threads);
        add(to, normed, b->feed_forward_post, b->eps, tokens, hidden, to, half, threads);
    }
    if (wanted) scatter(to, wanted, hidden * size, y);
    free(normed);
    return failed;
}

/* A block with what its tokens attend to; `kept` says whether keys and values are bfloat16. */
typedef struct {
    const Block *block;
    const Shape *shape;
    const Places *places;
    const void *cos, *sin;
    void *k, *v;
    int64_t kept;
} Pass;

/* Blocks one after the other; of the last one only `few` tokens are made, those `wanted`, or all where `few` is below 0. */
int block_steps(const Pass *pass, int64_t count, int64_t tokens, const int64_t *wanted, int64_t few, const void *x, void *y,
                int half, int threads) {
    const Wanted some = {wanted, few};
    int failed = 0;
    for (const Pass *p = pass, *last = pass + count - 1; p <= last; x = y, p++)
        failed |= block_step(p->block, p->shape, p->places, tokens, few >= 0 && p == last ? &some : NULL, x, p->cos, p->sin,
                             p->k, p->v, y, half, (int)p->kept, threads);
    return failed;
}
