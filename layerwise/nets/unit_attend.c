/* Attention in bfloat16 by the matrix unit of a processor (AMX).

   A group is tokens whose sequences begin with the same blocks, for instance all of a prompt, with the heads that read
   the same keys. It goes over slots SPAN at a time, from places that are the same for all tokens; what several tokens see
   in the same blocks is read once for all of them. Queries stand in columns of sixteen: keys, as they are stored, times
   queries are logits with a slot a row, so that softmax goes down the rows of sixteen queries at once; values turned over,
   times weights rounded to bfloat16, are the results with a channel a row. What a token gets does not depend on its
   group. */

#include "groups.h"
#include "half.h"

#ifdef MATRIX_UNIT

#include <omp.h>

/* Tiles of the slots that are read at a time; columns and tokens of a group at most; tiles of sums at once. */
enum { PARTS = SPAN / SIDE, COLUMNS = 4, TOKENS = COLUMNS * SIDE, AT_ONCE = 4 };

/* Tokens from `first` on in the order, and the heads from `head` on that read `kv_head`; a column holds `each` tokens. */
typedef struct {
    int64_t first, tokens, kv_head, head, heads, each;
} Group;

/* What one thread works in. */
typedef struct {
    bf16 *queries;        /* [COLUMNS, width / DEEP, NUMBERS], turned over */
    bf16 *pairs, *values; /* [width / SIDE, SIDE, SIDE pairs]; [width / SIDE, SPAN / DEEP, NUMBERS], turned over */
    float *logits, *sums; /* [SPAN, LANES]; [AT_ONCE * SIDE, LANES] */
    bf16 *weights;        /* [SPAN / DEEP, NUMBERS], pairs of slots */
    float *out;           /* [COLUMNS, width, LANES] */
    __m512 most[COLUMNS], sum[COLUMNS];
    __m512i from[COLUMNS], to[COLUMNS];
    Sight sights[TOKENS];
} Room;

/* Queries normed and turned, keys as well and to their slots with the values. */
INLINE void enter(const Shape *a, const Places *p, const HeadNorms *norms, int64_t token, const bf16 *qkv,
                  const void *cos, const void *sin, bf16 *q, bf16 *k, bf16 *v) {
    const int64_t width = a->width, all = a->heads + 2 * a->kv_heads;
    const float eps = norms ? norms->eps : 0;
    float turned[WIDEST] __attribute__((aligned(LINE)));
    for (int64_t h = 0; h < a->heads + a->kv_heads; h++) {
        const int64_t of_key = h - a->heads;
        const float *norm = !norms ? NULL : of_key < 0 ? norms->q : norms->k;
        bf16 *to = of_key < 0 ? q + (token * a->heads + h) * width : k + (of_key * a->slots + p->slot[token]) * width;
        turn(a, qkv, (token * all + h) * width, norm, eps, cos, sin, token, turned, 1);
        for (int64_t i = 0; i < width; i += LANES) store_narrow(to + i, _mm512_load_ps(turned + i));
    }
    for (int64_t h = 0; h < a->kv_heads; h++)
        memcpy(v + (h * a->slots + p->slot[token]) * width,
               qkv + (token * all + a->heads + a->kv_heads + h) * width, width * sizeof *v);
}

/* Keys or values of SPAN slots, tile by tile. */
typedef struct {
    const bf16 *tile[PARTS];
} Slots;

/* Slot `j` on its way into the cache. */
INLINE void fetch_slot(const Slots *slots, int64_t j, int64_t width) {
    for (int64_t i = 0; i < width; i += LINE / 2) __builtin_prefetch(slots->tile[j / SIDE] + j % SIDE * width + i);
}

/* Sums of AT_ONCE tiles of rows with one of columns. A tile of rows lies `next` numbers behind the one before it, its rows
   `apart`; tiles of columns lie one behind the other. */
INLINE void sums_of(const bf16 *const rows[AT_ONCE], int64_t next, int64_t apart, const bf16 *columns, int64_t steps,
                    float *sums) {
    settle();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < steps; i++) {
        _tile_loadd(6, columns + i * NUMBERS, ACROSS);
        _tile_loadd(4, rows[0] + i * next, apart * 2);
        _tile_loadd(5, rows[1] + i * next, apart * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        _tile_loadd(4, rows[2] + i * next, apart * 2);
        _tile_loadd(5, rows[3] + i * next, apart * 2);
        _tile_dpbf16ps(2, 4, 6);
        _tile_dpbf16ps(3, 5, 6);
    }
    _tile_stored(0, sums, ACROSS);
    _tile_stored(1, sums + SIDE * LANES, ACROSS);
    _tile_stored(2, sums + 2 * SIDE * LANES, ACROSS);
    _tile_stored(3, sums + 3 * SIDE * LANES, ACROSS);
}

/* Values of SPAN slots with a channel a row; what lies outside `from` and `to` counts as zero. Those of the `next` span are
   fetched on the way. */
INLINE void turn_values(const Slots *values, const Slots *next, int64_t from, int64_t to, int64_t width, Room *room) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t half = 0; half < SPAN / DEEP; half++) {
        for (int64_t j = 0; j < SIDE; j++) {
            const int64_t slot = half * DEEP + 2 * j;
            const bf16 *at = values->tile[slot / SIDE] + slot % SIDE * width;
            const __mmask32 first = slot >= from && slot < to ? 0xffffffff : 0;
            const __mmask32 second = slot + 1 >= from && slot + 1 < to ? 0xffffffff : 0;
            if (next) fetch_slot(next, slot, width), fetch_slot(next, slot + 1, width);
            for (int64_t i = 0; i < width; i += DEEP) {
                const __m512i a = _mm512_maskz_loadu_epi16(first, at + i);
                const __m512i b = _mm512_maskz_loadu_epi16(second, at + width + i);
                bf16 *pair = room->pairs + (i / SIDE * SIDE + j) * DEEP;
                _mm512_store_si512(pair, _mm512_permutex2var_epi16(a, low, b));
                _mm512_store_si512(pair + NUMBERS, _mm512_permutex2var_epi16(a, high, b));
            }
        }
        for (int64_t c = 0; c < width / SIDE; c++)
            turn_rows(room->pairs + c * NUMBERS, DEEP, SIDE, DEEP, room->values + (c * (SPAN / DEEP) + half) * NUMBERS);
    }
}

/* Logits of column `c` become weights, of lanes in `which`; gives what earlier sums of these lanes are to be scaled with.
   The `next` keys are fetched on the way. */
INLINE __m512 weigh_column(Room *room, int c, int64_t span, __mmask16 which, float scale, const Slots *next,
                           int64_t width) {
    const __m512i from = room->from[c], to = room->to[c];
    const __m512 hidden = _mm512_set1_ps(HIDDEN), by = _mm512_set1_ps(scale * LOG2_OF_E);
    const int all = !(which & (_mm512_cmpgt_epi32_mask(from, _mm512_set1_epi32((int)span)) |
                               _mm512_cmplt_epi32_mask(to, _mm512_set1_epi32((int)span + SPAN))));
    for (int j = 0; !all && j < SPAN; j++) {
        const __m512i slot = _mm512_set1_epi32((int)span + j);
        const __mmask16 seen = _mm512_cmple_epi32_mask(from, slot) & _mm512_cmpgt_epi32_mask(to, slot);
        _mm512_mask_store_ps(room->logits + j * LANES, (__mmask16)~seen, hidden);
    }
    __m512 most[4] = {hidden, hidden, hidden, hidden};
    for (int j = 0; j < SPAN; j += 4)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) most[i] = _mm512_max_ps(most[i], _mm512_load_ps(room->logits + (j + i) * LANES));
    const __m512 here = _mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3]));
    const __m512 now = _mm512_mask_max_ps(room->most[c], which, room->most[c], here), shift = _mm512_mul_ps(now, by);
    const __m512 before = two_to(_mm512_mul_ps(_mm512_sub_ps(room->most[c], now), by));
    const __m512i by_slots = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                              5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
#pragma GCC unroll 2
    for (int j = 0; j < SPAN; j += 2) {
        if (next) fetch_slot(next, j, width), fetch_slot(next, j + 1, width);
        const __m512 a = two_to(_mm512_fmsub_ps(_mm512_load_ps(room->logits + j * LANES), by, shift));
        const __m512 b = two_to(_mm512_fmsub_ps(_mm512_load_ps(room->logits + (j + 1) * LANES), by, shift));
        sums[0] = _mm512_add_ps(sums[0], a), sums[1] = _mm512_add_ps(sums[1], b);
        _mm512_store_si512(room->weights + j * LANES,
                           _mm512_permutexvar_epi16(by_slots, (__m512i)_mm512_cvtne2ps_pbh(b, a)));
    }
    room->sum[c] = _mm512_mask_fmadd_ps(room->sum[c], which, before, _mm512_add_ps(sums[0], sums[1]));
    room->most[c] = now;
    return before;
}

/* The lanes of column `c` that tokens from `first` to the one before `stop` of the group have. */
INLINE __mmask16 lanes_of(const Group *g, int64_t c, int64_t first, int64_t stop) {
    const int64_t low = first - c * g->each, high = stop - c * g->each;
    const int64_t from = low < 0 ? 0 : low, to = high > g->each ? g->each : high;
    return (__mmask16)((1u << to * g->heads) - 1) & (__mmask16) ~((1u << from * g->heads) - 1);
}

/* The keys and values of SPAN slots from `span` on; a tile of which nothing is between `from` and `to` is another one. */
INLINE void find_slots(const Shape *a, const int64_t *table, int64_t kv_head, int64_t span, int64_t from, int64_t to,
                       const bf16 *k, const bf16 *v, int64_t width, Slots *keys, Slots *values) {
    for (int64_t s = 0; s < PARTS; s++) {
        int64_t slot = span + s * SIDE;
        if (slot >= to || slot + SIDE <= from) slot = from / SIDE * SIDE;
        const int64_t at = (kv_head * a->slots + table[slot / a->block] * a->block + slot % a->block) * width;
        keys->tile[s] = k + at, values->tile[s] = v + at;
    }
}

/* Tokens from `first` to the one before `stop` see the slots of a span. */
INLINE void span_of(const Shape *a, const Group *g, Room *room, int64_t span, int64_t first, int64_t stop, const bf16 *k,
                    const bf16 *v, int64_t width) {
    const int64_t *table = room->sights[first].table;
    const Range all = range_of(room->sights, first, stop);
    const int64_t from = all.from < span ? span : all.from, to = all.to > span + SPAN ? span + SPAN : all.to;
    const int more = room->sights[first].to > span + SPAN;
    Slots keys, values, next_keys, next_values;
    find_slots(a, table, g->kv_head, span, from, to, k, v, width, &keys, &values);
    if (more)
        find_slots(a, table, g->kv_head, span + SPAN, span + SPAN, room->sights[first].to, k, v, width, &next_keys,
                   &next_values);
    turn_values(&values, more ? &next_values : NULL, from - span, to - span, width, room);
    for (int64_t c = first / g->each; c * g->each < stop; c++) {
        const __mmask16 which = lanes_of(g, c, first, stop);
        sums_of(keys.tile, DEEP, width, room->queries + c * SIDE * width, width / DEEP, room->logits);
        const Slots *next = more && c == first / g->each ? &next_keys : NULL;
        const __m512 before = weigh_column(room, (int)c, span, which, a->scale, next, width);
        for (int64_t i = 0; i < width / SIDE; i += AT_ONCE) {
            const bf16 *channels[AT_ONCE];
            for (int64_t j = 0; j < AT_ONCE; j++) channels[j] = room->values + (i + j) * (SPAN / DEEP) * NUMBERS;
            sums_of(channels, NUMBERS, DEEP, room->weights, SPAN / DEEP, room->sums);
            float *out = room->out + (c * width + i * SIDE) * LANES;
            for (int64_t j = 0; j < AT_ONCE * SIDE; j++, out += LANES) {
                const __m512 old = _mm512_load_ps(out), new = _mm512_load_ps(room->sums + j * LANES);
                _mm512_store_ps(out, _mm512_mask_mov_ps(old, which, _mm512_fmadd_ps(old, before, new)));
            }
        }
    }
}

/* The queries of a group in columns, and what each of its tokens sees. */
INLINE void gather(const Shape *a, const Places *p, const Group *g, const bf16 *q, Room *room, int64_t width) {
    int32_t from[TOKENS] __attribute__((aligned(LINE))) = {0}, to[TOKENS] __attribute__((aligned(LINE))) = {0};
    for (int64_t t = 0; t < g->tokens; t++) {
        const Sight seen = room->sights[t] = sight_of(a, p, p->order[g->first + t]);
        const int64_t lane = t / g->each * LANES + t % g->each * g->heads;
        for (int64_t h = 0; h < g->heads; h++) from[lane + h] = (int32_t)seen.from, to[lane + h] = (int32_t)seen.to;
    }
    for (int64_t c = 0; c * g->each < g->tokens; c++) {
        const bf16 *of[SIDE];
        for (int64_t lane = 0; lane < LANES; lane++) { /* lanes that no query needs hold any */
            const int64_t t = c * g->each + lane / g->heads, there = t < g->tokens ? t : g->tokens - 1;
            of[lane] = q + (room->sights[there].token * a->heads + g->head + lane % g->heads) * width;
        }
        for (int64_t i = 0; i < width; i += DEEP)
            turned_over(of, i, (__m512i *)(room->queries + (c * width + i) * SIDE));
        room->from[c] = _mm512_load_si512(from + c * LANES), room->to[c] = _mm512_load_si512(to + c * LANES);
        room->most[c] = _mm512_set1_ps(LOWEST), room->sum[c] = _mm512_setzero_ps();
        memset(room->out + c * width * LANES, 0, width * LANES * sizeof *room->out);
    }
}

/* What the tokens of a group got, a row of `out` each. */
INLINE void scatter(const Shape *a, const Group *g, Room *room, bf16 *out, int64_t width) {
    for (int64_t c = 0; c * g->each < g->tokens; c++)
        for (int64_t i = 0; i < width; i += LANES) {
            __m512i turned[LANES];
            const bf16 *rows[LANES];
            float *of = room->out + (c * width + i) * LANES;
            for (int64_t j = 0; j < LANES; j++) {
                rows[j] = (const bf16 *)(of + j * LANES);
                _mm512_store_ps(of + j * LANES, _mm512_div_ps(_mm512_load_ps(of + j * LANES), room->sum[c]));
            }
            turned_over(rows, 0, turned);
            for (int64_t lane = 0; lane < g->each * g->heads && c * g->each + lane / g->heads < g->tokens; lane++) {
                const int64_t token = room->sights[c * g->each + lane / g->heads].token;
                store_narrow(out + (token * a->heads + g->head + lane % g->heads) * width + i, (__m512)turned[lane]);
            }
        }
}

INLINE void group_in(const Shape *a, const Places *p, const Group *g, const bf16 *q, const bf16 *k, const bf16 *v,
                     bf16 *out, Room *room, int64_t width) {
    gather(a, p, g, q, room, width);
    const Range all = range_of(room->sights, 0, g->tokens);
    for (int64_t span = all.from / SPAN * SPAN; span < all.to; span += SPAN)
        for (int64_t first = 0, stop; first < g->tokens; first = stop) {
            const Sight *one = room->sights + first;
            for (stop = first + 1; stop < g->tokens && alike(one, room->sights + stop, span, a->block);) stop++;
            int64_t seen = 0;
            for (int64_t t = first; t < stop; t++)
                seen |= room->sights[t].from < span + SPAN && room->sights[t].to > span;
            if (seen) span_of(a, g, room, span, first, stop, k, v, width);
        }
    scatter(a, g, room, out, width);
}

int unit_attends(const Shape *a) {
    return unit_multiplies(SIDE, DEEP) && a->softcap == 0 && a->scale > 0 && a->width % (AT_ONCE * SIDE) == 0 &&
           a->block % SIDE == 0;
}

int unit_attend(const Shape *a, const Places *p, const HeadNorms *norms, int64_t tokens, const bf16 *qkv,
                const void *cos, const void *sin, bf16 *k, bf16 *v, bf16 *out, int threads) {
    const int64_t width = a->width, group = a->heads / a->kv_heads, heads = group < LANES ? group : LANES;
    const int64_t each = LANES / heads, parts = (group + heads - 1) / heads;
    const size_t queries = lines(tokens * a->heads * width * sizeof(bf16));
    const size_t numbers = (size_t)((COLUMNS * SIDE + 2 * SIDE + SPAN) * width + SPAN * LANES) * sizeof(bf16);
    const size_t floats = (SPAN * LANES + AT_ONCE * SIDE * LANES + COLUMNS * width * LANES) * sizeof(float);
    const size_t own = lines(numbers + floats + sizeof(Room));
    char *memory = aligned_alloc(LINE, lines(queries + threads * own + tokens * sizeof(int64_t)));
    if (!memory) return 1;
    bf16 *q = (bf16 *)memory;
    int64_t *from = (int64_t *)(memory + queries + threads * own), count = 0;
    for (int64_t t = 0; t < tokens; t += grouped(a, p, t, tokens, COLUMNS * each)) from[count++] = t;
#pragma omp parallel num_threads(threads)
    {
        char *mine = memory + queries + omp_get_thread_num() * own;
        Room *room = (Room *)mine;
        mine += lines(sizeof *room);
        room->queries = (bf16 *)mine;
        room->pairs = room->queries + COLUMNS * SIDE * width;
        room->values = room->pairs + 2 * SIDE * width;
        room->weights = room->values + SPAN * width;
        room->logits = (float *)(room->weights + SPAN * LANES);
        room->sums = room->logits + SPAN * LANES;
        room->out = room->sums + AT_ONCE * SIDE * LANES;
        _tile_loadconfig(&WHOLE);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) enter(a, p, norms, t, qkv, cos, sin, q, k, v);
        /* A head of all tokens before the next head: sequences with a common prefix share its slots. */
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count * parts * a->kv_heads; i++) {
            const int64_t first = from[i % count], kv_head = i / count / parts, head = i / count % parts * heads;
            const Group g = {first, grouped(a, p, first, tokens, COLUMNS * each), kv_head, kv_head * group + head,
                             group - head < heads ? group - head : heads, each};
            if (width == 64) group_in(a, p, &g, q, k, v, out, room, 64);
            else group_in(a, p, &g, q, k, v, out, room, width);
        }
        _tile_release();
    }
    free(memory);
    return 0;
}

#else

int unit_attends(const Shape *a) { return 0 * a->heads; }

int unit_attend(const Shape *a, const Places *p, const HeadNorms *norms, int64_t tokens, const bf16 *qkv,
                const void *cos, const void *sin, bf16 *k, bf16 *v, bf16 *out, int threads) {
    (void)a, (void)p, (void)norms, (void)tokens, (void)qkv, (void)cos, (void)sin, (void)k, (void)v, (void)out;
    return threads;
}

#endif
