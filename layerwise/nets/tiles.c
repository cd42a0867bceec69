/* Attention in bfloat16 by tiles of queries, for processors that multiply pairs of bfloat16.

   Tokens that follow one another in a sequence, and heads that read the same keys, form a tile. A tile goes over the
   slots that it sees SPAN at a time, from places that are the same for all tokens, so that what a token gets does not
   depend on its tile. Queries are rounded to bfloat16; softmax and sums are in float32. */

#include "half.h"

#include <omp.h>

#ifdef __AVX512BF16__

/* Slots that a tile reads at a time; tokens and queries of a tile at most; queries whose
   products are summed at once, whose values are, and vectors of these; how many slots ahead memory is fetched. */
enum { SPAN = 64, TOKENS = 16, QUERIES = 48, LOGITS_AT_ONCE = 8, SUMS_AT_ONCE = 4, CUT = 4, AHEAD = 32 };

/* Tokens from `token` on, and the heads from `head` on that read `kv_head`. */
typedef struct {
    int64_t token, tokens, kv_head, head, heads;
} Tile;

/* What one thread works in. */
typedef struct {
    float *values, *logits, *out; /* [SPAN, width], [QUERIES, SPAN], [QUERIES, width] */
    __m512i *keys;                /* [width / 2]: pairs of channels of LANES slots */
    float most[QUERIES], sum[QUERIES];
} Room;

/* Logits of `count` queries with the slots whose keys are in `keys`; two sums for each, as one waits for itself. */
INLINE void logits_with(const __m512i *keys, const bf16 *const *q, int count, int64_t width, float scale, float *to) {
    __m512 sum[LOGITS_AT_ONCE][2];
#pragma GCC unroll 8
    for (int n = 0; n < count; n++) sum[n][0] = sum[n][1] = _mm512_setzero_ps();
    for (int64_t i = 0; i < width / 2; i += 2)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++)
#pragma GCC unroll 8
            for (int n = 0; n < count; n++) {
                int32_t pair;
                memcpy(&pair, q[n] + 2 * (i + j), sizeof pair);
                sum[n][j] = _mm512_dpbf16_ps(sum[n][j], (__m512bh)keys[i + j], (__m512bh)_mm512_set1_epi32(pair));
            }
#pragma GCC unroll 8
    for (int n = 0; n < count; n++)
        _mm512_store_ps(to + n * SPAN, _mm512_mul_ps(_mm512_add_ps(sum[n][0], sum[n][1]), _mm512_set1_ps(scale)));
}

INLINE void all_logits(const __m512i *keys, const bf16 *const *q, int queries, int64_t width, float scale, float *to) {
    for (int n = 0; n < queries; n += LOGITS_AT_ONCE) {
        const int count = queries - n < LOGITS_AT_ONCE ? queries - n : LOGITS_AT_ONCE;
        if (count == LOGITS_AT_ONCE) logits_with(keys, q + n, LOGITS_AT_ONCE, width, scale, to + n * SPAN);
        else if (count == 3) logits_with(keys, q + n, 3, width, scale, to + n * SPAN);
        else
            for (int m = n; m < n + count; m++) logits_with(keys, q + m, 1, width, scale, to + m * SPAN);
    }
}

/* out += weights x values, for `count` queries and `vectors` vectors of channels. */
INLINE void add_values(const float *values, const float *weights, float *out, int count, int vectors, int64_t from,
                       int64_t to, int64_t width) {
    __m512 sum[SUMS_AT_ONCE][CUT];
#pragma GCC unroll 4
    for (int n = 0; n < count; n++)
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) sum[n][i] = _mm512_load_ps(out + n * width + i * LANES);
    for (int64_t j = from; j < to; j++) {
        __m512 value[CUT];
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) value[i] = _mm512_load_ps(values + j * width + i * LANES);
#pragma GCC unroll 4
        for (int n = 0; n < count; n++) {
            const __m512 weight = _mm512_set1_ps(weights[n * SPAN + j]);
#pragma GCC unroll 4
            for (int i = 0; i < vectors; i++) sum[n][i] = _mm512_fmadd_ps(weight, value[i], sum[n][i]);
        }
    }
#pragma GCC unroll 4
    for (int n = 0; n < count; n++)
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) _mm512_store_ps(out + n * width + i * LANES, sum[n][i]);
}

INLINE void add_all_values(const float *values, const float *weights, float *out, int queries, int64_t from, int64_t to,
                           int64_t width) {
    for (int64_t i = 0; i < width; i += CUT * LANES)
        for (int n = 0; n < queries; n += SUMS_AT_ONCE) {
            const int count = queries - n < SUMS_AT_ONCE ? queries - n : SUMS_AT_ONCE;
            const int vectors = width - i < CUT * LANES ? (int)(width - i) / LANES : CUT;
            const float *some = weights + n * SPAN;
            float *sums = out + n * width + i;
            if (count == SUMS_AT_ONCE && vectors == CUT)
                add_values(values + i, some, sums, SUMS_AT_ONCE, CUT, from, to, width);
            else if (count == 3 && vectors == CUT) add_values(values + i, some, sums, 3, CUT, from, to, width);
            else
                for (int m = 0; m < count; m++)
                    for (int v = 0; v < vectors; v++)
                        add_values(values + i + v * LANES, some + m * SPAN, sums + m * width + v * LANES, 1, 1, from,
                                   to, width);
        }
}

/* Logits of one query become weights; what it has of slots before them is scaled to the same largest logit. */
INLINE void weigh(float *logits, float *most, float *sum, float *out, int64_t width) {
    __m512 part[SPAN / LANES];
    for (int i = 0; i < SPAN / LANES; i++) part[i] = _mm512_load_ps(logits + i * LANES);
    const float here = _mm512_reduce_max_ps(
        _mm512_max_ps(_mm512_max_ps(part[0], part[1]), _mm512_max_ps(part[2], part[3])));
    if (here > *most) {
        const float scale = expf(*most - here);
        *most = here, *sum *= scale;
        for (int64_t i = 0; i < width; i += LANES)
            _mm512_store_ps(out + i, _mm512_mul_ps(_mm512_load_ps(out + i), _mm512_set1_ps(scale)));
    }
    for (int i = 0; i < SPAN / LANES; i++) {
        part[i] = two_to(_mm512_mul_ps(_mm512_sub_ps(part[i], _mm512_set1_ps(*most)), _mm512_set1_ps(LOG2_OF_E)));
        _mm512_store_ps(logits + i * LANES, part[i]);
    }
    *sum += _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(part[0], part[1]), _mm512_add_ps(part[2], part[3])));
}

/* Bits from `from` to the one before `to`, of those that a vector has. */
INLINE __mmask16 lanes(int64_t from, int64_t to) {
    const int low = from < 0 ? 0 : from > LANES ? LANES : (int)from, high = to < 0 ? 0 : to > LANES ? LANES : (int)to;
    return (__mmask16)((1u << high) - 1) & (__mmask16) ~((1u << low) - 1);
}

/* Where in the pool the numbers of LANES slots from `base` on lie; those before `from` are taken to be the first one, and
   those from `to` on the last. */
INLINE void places_of(const Shape *a, const int64_t *table, int64_t kv_head, int64_t base, int64_t from, int64_t to,
                      int64_t at[LANES]) {
    int64_t s = base < from ? from : base < to ? base : to - 1, block = s / a->block, in = s % a->block;
    for (int j = 0; j < LANES; j++) {
        at[j] = (kv_head * a->slots + table[block] * a->block + in) * a->width;
        if (base + j < s || s + 1 == to) continue;
        s++;
        if (++in == a->block) in = 0, block++;
    }
}

INLINE void fetch_slots(const bf16 *k, const bf16 *v, const int64_t at[LANES], int64_t width) {
    for (int j = 0; j < LANES; j++)
        for (int64_t i = 0; i < width; i += LINE / 2) {
            __builtin_prefetch(k + at[j] + i);
            __builtin_prefetch(v + at[j] + i);
        }
}

/* Keys of LANES slots, pair by pair of channels, and values of those from `from` to the one before `to`. */
INLINE void read_slots(const bf16 *k, const bf16 *v, const int64_t at[LANES], int64_t from, int64_t to, Room *room,
                       float *values, int64_t width) {
    const bf16 *keys[LANES];
    for (int j = 0; j < LANES; j++) {
        keys[j] = k + at[j];
        for (int64_t i = 0; j >= from && j < to && i < width; i += LANES)
            _mm512_store_ps(values + j * width + i, values_from(v + at[j] + i));
    }
    for (int64_t i = 0; i < width; i += 2 * LANES) turned_over(keys, i, room->keys + i / 2);
}

INLINE void tile_in(const Shape *a, const Places *p, Tile tile, const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out,
                    Room *room, int64_t width) {
    const int64_t row = p->row[tile.token], kept = p->first[row] * a->block;
    const int64_t *table = p->table + row * p->columns - p->first[row];
    const int64_t end = p->place[tile.token + tile.tokens - 1] + 1, first = p->place[tile.token] + 1;
    const int64_t start = a->window && first - a->window > kept ? first - a->window : kept;
    const int queries = (int)(tile.tokens * tile.heads);
    const bf16 *asks[QUERIES];
    int64_t begin[QUERIES], stop[QUERIES], at[LANES];
    for (int n = 0; n < queries; n++) {
        stop[n] = p->place[tile.token + n / tile.heads] + 1;
        begin[n] = a->window && stop[n] - a->window > kept ? stop[n] - a->window : kept;
        asks[n] = q + ((tile.token + n / tile.heads) * a->heads + tile.head + n % tile.heads) * width;
        room->most[n] = -1e30f, room->sum[n] = 0;
    }
    memset(room->out, 0, queries * width * sizeof *room->out);
    for (int64_t span = start / SPAN * SPAN; span < end; span += SPAN) {
        const int64_t from = span > kept ? span : kept, to = span + SPAN < end ? span + SPAN : end;
        for (int64_t base = span; base < span + SPAN; base += LANES) {
            float *logits = room->logits + (base - span);
            const int seen = base < to && base + LANES > from;
            if (seen) {
                places_of(a, table, tile.kv_head, base + AHEAD, kept, end, at);
                fetch_slots(k, v, at, width);
                places_of(a, table, tile.kv_head, base, from, to, at);
                read_slots(k, v, at, from - base, to - base, room, room->values + (base - span) * width, width);
                all_logits(room->keys, asks, queries, width, a->scale, logits);
            }
            for (int n = 0; n < queries; n++) {
                const __mmask16 mask = seen ? lanes(begin[n] - base, stop[n] - base) : 0;
                if (mask != 0xffff)
                    _mm512_mask_store_ps(logits + n * SPAN, (__mmask16)~mask, _mm512_set1_ps(-INFINITY));
            }
        }
        for (int n = 0; n < queries; n++)
            weigh(room->logits + n * SPAN, &room->most[n], &room->sum[n], room->out + n * width, width);
        add_all_values(room->values, room->logits, room->out, queries, from - span, to - span, width);
    }
    for (int n = 0; n < queries; n++) {
        bf16 *to = out + (asks[n] - q);
        for (int64_t i = 0; i < width; i += LANES)
            store_narrow(to + i, _mm512_div_ps(_mm512_load_ps(room->out + n * width + i), _mm512_set1_ps(room->sum[n])));
    }
}

/* As many tokens from `token` on as form a tile, `most` at most. */
static int64_t following(const Places *p, int64_t token, int64_t tokens, int64_t most) {
    int64_t count = 1;
    while (count < most && token + count < tokens && p->row[token + count] == p->row[token] &&
           p->place[token + count] == p->place[token] + count)
        count++;
    return count;
}

int tiles(const Shape *a) { return a->softcap == 0 && a->width % (2 * LANES) == 0; }

int attend_tiles(const Shape *a, const Places *p, const HeadNorms *norms, int64_t tokens, const bf16 *qkv,
                 const void *cos, const void *sin, bf16 *k, bf16 *v, bf16 *out, int threads) {
    const int64_t width = a->width, group = a->heads / a->kv_heads, heads = group < QUERIES ? group : QUERIES;
    const int64_t most = QUERIES / heads < TOKENS ? QUERIES / heads : TOKENS, parts = (group + heads - 1) / heads;
    const size_t queries = lines(tokens * a->heads * width * sizeof(bf16));
    const size_t own = (SPAN * width + QUERIES * SPAN + QUERIES * width) * sizeof(float) + width / 2 * LINE;
    char *memory = aligned_alloc(LINE, queries + threads * own + lines(tokens * sizeof(int64_t)));
    if (!memory) return 1;
    bf16 *q = (bf16 *)memory;
    int64_t *from = (int64_t *)(memory + queries + threads * own), count = 0;
    for (int64_t t = 0; t < tokens; t += following(p, t, tokens, most)) from[count++] = t;
#pragma omp parallel num_threads(threads)
    {
        char *mine = memory + queries + omp_get_thread_num() * own;
        Room room = {.values = (float *)mine};
        room.logits = room.values + SPAN * width;
        room.out = room.logits + QUERIES * SPAN;
        room.keys = (__m512i *)(room.out + QUERIES * width);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) enter(a, p, norms, t, qkv, cos, sin, q, k, v);
        /* A head of all tokens before the next head: sequences with a common prefix share its slots. */
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count * parts * a->kv_heads; i++) {
            const int64_t token = from[i % count], kv_head = i / count / parts, head = i / count % parts * heads;
            const Tile tile = {token, following(p, token, tokens, most), kv_head, kv_head * group + head,
                               group - head < heads ? group - head : heads};
            if (width == 64) tile_in(a, p, tile, q, k, v, out, &room, 64);
            else tile_in(a, p, tile, q, k, v, out, &room, width);
        }
    }
    free(memory);
    return 0;
}

#else

int tiles(const Shape *a) { return 0 * a->heads; }

int attend_tiles(const Shape *a, const Places *p, const HeadNorms *norms, int64_t tokens, const bf16 *qkv,
                 const void *cos, const void *sin, bf16 *k, bf16 *v, bf16 *out, int threads) {
    (void)a, (void)p, (void)norms, (void)tokens, (void)qkv, (void)cos, (void)sin, (void)k, (void)v, (void)out;
    return threads;
}

#endif
