/* Attention straight from blocks of slots for any number of tokens, computed in float32, or in bfloat16 on processors that
   multiply pairs of it; softmax and sums are in float32 always. `unit_attend.c` has it for a matrix unit.

   Queries and keys are normed head by head where there are norms, and rotated, and new keys and values go to their slots.
   A group is tokens whose sequences begin with the same blocks, with the heads that read the same keys (`groups.h`). Its
   queries are the rows of two products with panels: keys, turned over, of COLUMNS slots at a time, then values as they lie.
   A step of a panel is a number, or a pair in bfloat16: of channels of a key, of slots of values. Keys and values may be
   kept as codes (`nets/key_codes.py`). Softmax goes along with the spans of slots. What a token gets does not depend on its
   group. */

#include "groups.h"
#include "wide.h"

#include <omp.h>

enum { QUERIES = 96 }; /* of a group at most */

/* Tokens from `first` on in the order, and the heads from `head` on that read `kv_head`. */
typedef struct {
    int64_t first, tokens, kv_head, head, heads;
} Group;

/* What one thread works in. */
typedef struct {
    float *queries;        /* [QUERIES, steps] */
    float *logits;         /* [QUERIES, SPAN]; weights in pairs take the first half of a row */
    float *values, *out;   /* [steps of SPAN, whole] and [QUERIES, whole]; `whole` is the width in whole panels, zero beyond */
    float *widened, *keys; /* [COLUMNS, steps], and the same turned over */
    float most[QUERIES], sum[QUERIES];
    Sight sights[QUERIES];
} Room;

/* Numbers that share a step in 4 bits. */
INLINE int64_t group_of(int64_t width) { return (width & -width) < 32 ? width & -width : 32; }

/* Steps of so many numbers. */
INLINE int64_t steps_of(int64_t numbers, int pairs) { return pairs ? (numbers + 1) / 2 : numbers; }

/* Puts the numbers of a head into slot `slot`, counted over all heads. */
static void keep(void *pool, int64_t slot, const float *x, int64_t width, int kept) {
    const Codes *coded = pool;
    if (kept < KEPT_INT8) {
        for (int64_t i = 0; i < width; i += MANY) put_many(pool, slot * width + i, load_many(x + i), kept);
    } else if (kept == KEPT_INT8) {
        float most = 0;
        for (int64_t i = 0; i < width; i++) most = fabsf(x[i]) > most || x[i] != x[i] ? fabsf(x[i]) : most;
        const float scale = (most < 1e-12f ? 1e-12f : most) / 127;
        for (int64_t i = 0; i < width; i++) coded->codes[slot * width + i] = (uint8_t)(int8_t)nearbyintf(x[i] / scale);
        ((float *)coded->scale)[slot] = scale;
    } else {
        const int64_t group = group_of(width), groups = width / group;
        uint8_t codes[WIDEST];
        for (int64_t g = 0; g < groups; g++) {
            const float *some = x + g * group;
            float low = some[0], high = some[0];
            for (int64_t i = 1; i < group; i++) {
                low = some[i] < low || some[i] != some[i] ? some[i] : low;
                high = some[i] > high ? some[i] : high;
            }
            const bf16 least = narrowed(low);
            const float size = (high - widened(least)) / 15;
            const bf16 step = narrowed(size < 1e-12f ? 1e-12f : size);
            for (int64_t i = 0; i < group; i++) {
                const float code = nearbyintf((some[i] - widened(least)) / widened(step));
                codes[g * group + i] = code > 0 ? code < 15 ? (uint8_t)code : 15 : 0;
            }
            ((bf16 *)coded->scale)[slot * groups + g] = least, coded->step[slot * groups + g] = step;
        }
        for (int64_t i = 0; i < width / 2; i++)
            coded->codes[slot * (width / 2) + i] = codes[i] | (uint8_t)(codes[i + width / 2] << 4);
    }
}

/* The numbers of slot `slot`, counted over all heads, as float32. */
INLINE void read_kept(const void *pool, int64_t slot, float *to, int64_t width, int kept) {
    const Codes *coded = pool;
    if (kept < KEPT_INT8) {
        for (int64_t i = 0; i < width; i += MANY) put_many(to, i, get_many(pool, slot * width + i, kept), 0);
    } else if (kept == KEPT_INT8) {
        const int8_t *codes = (const int8_t *)coded->codes + slot * width;
        const float scale = ((const float *)coded->scale)[slot];
        for (int64_t i = 0; i < width; i++) to[i] = (float)codes[i] * scale;
    } else {
        const int64_t group = group_of(width), groups = width / group, middle = width / 2;
        const int64_t part = group_of(middle); /* of one group and one half */
        for (int64_t from = 0; from < width; from += part) {
            const int upper = from < middle ? 0 : 4;
            const uint8_t *codes = coded->codes + slot * middle + (upper ? from - middle : from);
            const float low = widened(((const bf16 *)coded->scale)[slot * groups + from / group]);
            const float step = widened(coded->step[slot * groups + from / group]);
            for (int64_t i = 0; i < part; i++) to[from + i] = low + (float)(codes[i] >> upper & 15) * step;
        }
    }
}

/* The queries of a token normed, turned and scaled, its keys normed and turned and to their slots with the values. */
static void enter(const Shape *a, const Places *p, const HeadNorms *norms, int64_t token, const void *qkv,
                  const void *cos, const void *sin, float *q, void *k, void *v, int half, int kept) {
    const int64_t width = a->width, all = a->heads + 2 * a->kv_heads;
    const float eps = norms ? norms->eps : 0;
    float numbers[WIDEST];
    for (int64_t h = 0; h < a->heads; h++) {
        float *to = q + (token * a->heads + h) * width;
        turn(a, qkv, (token * all + h) * width, norms ? norms->q : NULL, eps, cos, sin, token, to, half);
        for (int64_t i = 0; i < width; i++) to[i] *= a->scale;
    }
    for (int64_t h = 0; h < a->kv_heads; h++) {
        const int64_t from = (token * all + a->heads + h) * width, slot = h * a->slots + p->slot[token];
        turn(a, qkv, from, norms ? norms->k : NULL, eps, cos, sin, token, numbers, half);
        keep(k, slot, numbers, width, kept);
        for (int64_t i = 0; i < width; i += MANY)
            put_many(numbers, i, get_many(qkv, from + a->kv_heads * width + i, half), 0);
        keep(v, slot, numbers, width, kept);
    }
}

/* Where a slot is in the pool, counted over all heads. */
INLINE int64_t place_of(const Shape *a, const int64_t *table, int64_t kv_head, int64_t slot) {
    return kv_head * a->slots + table[slot / a->block] * a->block + slot % a->block;
}

/* The slots of a span, counted from its first one on, from `from` to the one before `to`, that some tokens of a group see,
   and where each is; those before are taken to be where the first is, and those behind where the last is. While a slot is
   read, the one at its place in the `next` span is fetched: at once memory gives far less. */
typedef struct Slots {
    int64_t from, to, at[SPAN];
    const struct Slots *next;
} Slots;

INLINE void find_slots(const Shape *a, const int64_t *table, int64_t kv_head, int64_t span, int64_t from, int64_t to,
                       Slots *slots) {
    int64_t at = place_of(a, table, kv_head, from), left = a->block - from % a->block;
    for (int64_t j = 0; j < SPAN; j++) {
        slots->at[j] = at;
        if (span + j < from || span + j + 1 >= to) continue;
        at++;
        if (--left == 0) at = place_of(a, table, kv_head, span + j + 1), left = a->block;
    }
    slots->from = from - span, slots->to = to - span;
}

/* A slot on its way into the second cache. */
INLINE void fetch_slot(const void *pool, int64_t slot, int64_t width, int kept) {
    const int64_t bits = kept == KEPT_FLOAT32 ? 32 : kept == KEPT_BFLOAT16 ? 16 : kept == KEPT_INT8 ? 8 : 4;
    const int64_t size = width * bits / 8;
    const char *at = (const char *)(kept < KEPT_INT8 ? pool : ((const Codes *)pool)->codes) + slot * size;
    for (int64_t i = 0; i < size; i += LINE) __builtin_prefetch(at + i, 0, 2);
}

INLINE int64_t whole(int64_t width) { return (width + COLUMNS - 1) / COLUMNS * COLUMNS; }

/* Numbers of `count` slots from `slot` on as float32, a row each, `apart`; those that are not seen are zero. */
INLINE void widen(const Slots *slots, int64_t slot, int64_t count, const void *from, float *to, int64_t apart,
                  int64_t width, int kept) {
    for (int64_t j = slot; j < slot + count; j++, to += apart) {
        fetch_slot(from, slots->next->at[j], width, kept);
        if (j < slots->from || j >= slots->to) memset(to, 0, width * sizeof *to);
        else read_kept(from, slots->at[j], to, width, kept);
    }
}

/* The numbers of slot `slot` in bfloat16, where they lie or in `room`, which has room for as many floats. */
INLINE const bf16 *in_bfloat16(const void *pool, int64_t slot, float *room, int64_t width, int kept) {
    if (kept == KEPT_BFLOAT16) return (const bf16 *)pool + slot * width;
    read_kept(pool, slot, room, width, kept);
    for (int64_t i = 0; i < width; i += MANY) put_many(room, i, load_many(room + i), 1);
    return (const bf16 *)room;
}

/* The values of a span, pair by pair of slots; those of slots that are not seen are zero. */
INLINE void pair_values(const Slots *slots, const void *v, float *room, float *to, int64_t apart, int64_t width, int kept) {
    static const bf16 none[WIDEST];
    for (int64_t j = 0; j < SPAN; j += 2, to += apart) {
        const bf16 *of[2];
        for (int n = 0; n < 2; n++) {
            fetch_slot(v, slots->next->at[j + n], width, kept);
            of[n] = j + n < slots->from || j + n >= slots->to
                        ? none : in_bfloat16(v, slots->at[j + n], room + n * width, width, kept);
        }
        for (int64_t i = 0; i < width; i++) {
            const uint32_t pair = of[0][i] | (uint32_t)of[1][i] << 16;
            memcpy(to + i, &pair, sizeof pair);
        }
    }
}

/* The keys of COLUMNS slots from `slot` on, turned over; those of slots that are not seen are any. */
INLINE void turn_keys(const Slots *slots, int64_t slot, const void *k, Room *room, int64_t width, int kept, int pairs) {
    if (!pairs && kept != KEPT_BFLOAT16) {
        widen(slots, slot, COLUMNS, k, room->widened, width, width, kept);
        for (int64_t i = 0; i < width; i += MANY)
            for (int64_t j = 0; j < COLUMNS; j += MANY)
                turn_over(room->widened + j * width + i, width, room->keys + i * COLUMNS + j);
        return;
    }
    for (int64_t j = 0; j < COLUMNS; j += SIXTEEN) {
        const bf16 *rows[SIXTEEN];
        for (int64_t n = 0; n < SIXTEEN; n++) {
            fetch_slot(k, slots->next->at[slot + j + n], width, kept);
            rows[n] = in_bfloat16(k, slots->at[slot + j + n], room->widened + n * width, width, kept);
        }
        if (!pairs)
            for (int64_t i = 0; i < width; i += MANY) widen_over(rows, i, room->keys + i * COLUMNS + j);
        else
            for (int64_t i = 0; i < width / 2; i += MANY)
                for (int64_t n = 0; n < SIXTEEN; n += MANY)
                    turn_over_rows((const float *const *)rows + n, i, room->keys + i * COLUMNS + j + n);
    }
}

/* Logits of `count` queries from query `m` on with the keys of COLUMNS slots. */
INLINE void logits_of(Room *room, int64_t m, int count, int64_t column, int64_t width, int pairs) {
    const int64_t steps = steps_of(width, pairs);
    wide sum[ROWS_OF_SUMS][2];
#pragma GCC unroll 12
    for (int r = 0; r < count; r++) sum[r][0] = sum[r][1] = (wide){0};
    add_panel(room->queries + m * steps, steps, room->keys, COLUMNS, steps, count, pairs, sum);
#pragma GCC unroll 12
    for (int r = 0; r < count; r++) {
        store_wide(room->logits + (m + r) * SPAN + column, sum[r][0]);
        store_wide(room->logits + (m + r) * SPAN + column + WIDE, sum[r][1]);
    }
}

/* What `count` queries from query `m` on read of COLUMNS channels, of slots `low` to the one before `high` of a span. */
INLINE void values_of(Room *room, int64_t m, int count, int64_t channel, int64_t low, int64_t high, int64_t width, int pairs) {
    wide sum[ROWS_OF_SUMS][2];
    const int64_t apart = whole(width), from = pairs ? low / 2 : low, steps = steps_of(high, pairs) - from;
    float *out = room->out + m * apart + channel;
#pragma GCC unroll 12
    for (int r = 0; r < count; r++) sum[r][0] = load_wide(out + r * apart), sum[r][1] = load_wide(out + r * apart + WIDE);
    add_panel(room->logits + m * SPAN + from, SPAN, room->values + from * apart + channel, apart, steps, count,
              pairs, sum);
#pragma GCC unroll 12
    for (int r = 0; r < count; r++) store_wide(out + r * apart, sum[r][0]), store_wide(out + r * apart + WIDE, sum[r][1]);
}

/* Logits of one query become weights, or pairs of them; what it has of spans before is scaled to the same largest logit. */
INLINE void weigh(const Sight *seen, int64_t span, float softcap, float *logits, float *most, float *sum, float *out,
                  int64_t width, int pairs) {
    if (softcap != 0)
        for (int64_t j = 0; j < SPAN; j++) logits[j] = softcap * tanhf(logits[j] / softcap);
    for (int64_t j = 0; j < seen->from - span; j++) logits[j] = HIDDEN;
    for (int64_t j = seen->to - span; j < SPAN; j++) logits[j] = HIDDEN;
    wide highest = load_wide(logits), total = {0};
    for (int64_t j = WIDE; j < SPAN; j += WIDE) highest = larger(highest, load_wide(logits + j));
    const float here = most_of_wide(highest);
    if (here > *most) {
        const float scale = expf(*most - here);
        *most = here, *sum *= scale;
        for (int64_t i = 0; i < width; i += MANY) put_many(out, i, load_many(out + i) * scale, 0);
    }
    for (int64_t j = 0; j < SPAN; j += WIDE) {
        const wide weights = weight_of(load_wide(logits + j) - *most);
        total += weights;
        if (pairs) put_wide(logits, j, weights);
        else store_wide(logits + j, weights);
    }
    *sum += sum_of_wide(total);
}

/* Tokens from `first` to the one before `stop` of a group see slots of a span, in the same blocks. */
INLINE void span_of(const Shape *a, const Group *g, const Slots *next, Room *room, int64_t span, int64_t first,
                    int64_t stop, const void *k, const void *v, int64_t width, int kept, int pairs) {
    const Range all = range_of(room->sights, first, stop);
    const int64_t from = all.from < span ? span : all.from, to = all.to > span + SPAN ? span + SPAN : all.to;
    if (from >= to) return;
    const int64_t low = (from - span) / COLUMNS * COLUMNS, high = to - span, after = stop * g->heads;
    Slots slots = {.next = next};
    find_slots(a, room->sights[first].table, g->kv_head, span, from, to, &slots);
    for (int64_t column = low, some; column < high; column += COLUMNS) {
        turn_keys(&slots, column, k, room, width, kept, pairs);
        for (int64_t m = first * g->heads; m < after; m += some) {
            some = rows_at_once(after - m);
#define TAKE(n) logits_of(room, m, n, column, width, pairs)
            WITH_ROWS(some, TAKE)
#undef TAKE
        }
    }
    if (pairs) pair_values(&slots, v, room->widened, room->values, whole(width), width, kept);
    else widen(&slots, 0, SPAN, v, room->values, whole(width), width, kept);
    for (int64_t t = first; t < stop; t++)
        for (int64_t m = t * g->heads; m < (t + 1) * g->heads; m++) {
            Sight sight = room->sights[t];
            sight.from = sight.from > from ? sight.from : from, sight.to = sight.to < to ? sight.to : to;
            sight.from = sight.from < to ? sight.from : to, sight.to = sight.to > span ? sight.to : span;
            weigh(&sight, span, a->softcap, room->logits + m * SPAN, room->most + m, room->sum + m,
                  room->out + m * whole(width), width, pairs);
        }
    for (int64_t channel = 0; channel < width; channel += COLUMNS)
        for (int64_t m = first * g->heads, some; m < after; m += some) {
            some = rows_at_once(after - m);
#define TAKE(n) values_of(room, m, n, channel, from - span, high, width, pairs)
            WITH_ROWS(some, TAKE)
#undef TAKE
        }
}

/* The slots that are read after those that the tokens before `stop` see of a span: what others of the group see of it, or of
   the next one, or else the first ones of group `after`, which has its first token and its head of keys only. */
INLINE void find_next(const Shape *a, const Places *p, const Group *g, const Group *after, const Sight *sights,
                      int64_t span, int64_t stop, Slots *next) {
    int64_t t = stop;
    while (t < g->tokens && sights[t].to <= span) t++;
    if (t == g->tokens)
        for (t = 0, span += SPAN; t < g->tokens && sights[t].to <= span;) t++;
    const int inside = t < g->tokens;
    const Sight one = inside ? sights[t] : sight_of(a, p, p->order[after->first]);
    if (!inside) span = one.from / SPAN * SPAN;
    const int64_t from = one.from > span ? one.from : span, to = one.to < span + SPAN ? one.to : span + SPAN;
    find_slots(a, one.table, inside ? g->kv_head : after->kv_head, span, from, to, next);
}

INLINE void group_in(const Shape *a, const Places *p, const Group *g, const Group *after, const float *q, const void *k,
                     const void *v, void *out, Room *room, int64_t width, int half, int kept, int pairs) {
    for (int64_t t = 0; t < g->tokens; t++) {
        const Sight seen = room->sights[t] = sight_of(a, p, p->order[g->first + t]);
        const int64_t numbers = g->heads * width;
        const float *from = q + (seen.token * a->heads + g->head) * width;
        float *to = room->queries + t * g->heads * steps_of(width, pairs);
        for (int64_t i = 0; i < numbers; i += MANY) put_many(to, i, load_many(from + i), pairs);
    }
    for (int64_t m = 0; m < g->tokens * g->heads; m++) room->most[m] = LOWEST, room->sum[m] = 0;
    memset(room->out, 0, g->tokens * g->heads * whole(width) * sizeof *room->out);
    const Range all = range_of(room->sights, 0, g->tokens);
    for (int64_t span = all.from / SPAN * SPAN; span < all.to; span += SPAN)
        for (int64_t first = 0, stop; first < g->tokens; first = stop) {
            const Sight *one = room->sights + first;
            Slots next;
            for (stop = first + 1; stop < g->tokens && alike(one, room->sights + stop, span, a->block);) stop++;
            find_next(a, p, g, after, room->sights, span, stop, &next);
            span_of(a, g, &next, room, span, first, stop, k, v, width, kept, pairs);
        }
    for (int64_t m = 0; m < g->tokens * g->heads; m++) {
        const int64_t to = (room->sights[m / g->heads].token * a->heads + g->head + m % g->heads) * width;
        for (int64_t i = 0; i < width; i += MANY)
            put_many(out, to + i, load_many(room->out + m * whole(width) + i) / room->sum[m], half);
    }
}

static int attend_in(const Shape *a, const Places *p, const HeadNorms *norms, int64_t tokens, const void *qkv,
                     const void *cos, const void *sin, void *k, void *v, void *out, int half, int kept, int pairs,
                     int threads) {
    const int64_t width = a->width, group = a->heads / a->kv_heads, heads = group < QUERIES ? group : QUERIES;
    const int64_t most = QUERIES / heads, parts = (group + heads - 1) / heads;
    const size_t queries = lines(tokens * a->heads * width * sizeof(float)), head = lines(sizeof(Room));
    const size_t parts_of_values = (QUERIES + SPAN) * whole(width), of_width = (QUERIES + 2 * COLUMNS) * width;
    const size_t own = head + lines((parts_of_values + of_width + QUERIES * SPAN) * sizeof(float));
    char *memory = aligned_alloc(LINE, lines(queries + threads * own + tokens * sizeof(int64_t)));
    if (!memory) return 1;
    float *q = (float *)memory;
    int64_t *from = (int64_t *)(memory + queries + threads * own), count = 0;
    for (int64_t t = 0; t < tokens; t += grouped(a, p, t, tokens, most)) from[count++] = t;
    const int64_t all = count * parts * a->kv_heads;
#pragma omp parallel num_threads(threads)
    {
        char *mine = memory + queries + omp_get_thread_num() * own;
        Room *room = (Room *)mine;
        room->out = (float *)(mine + head), room->values = room->out + QUERIES * whole(width);
        room->queries = room->values + SPAN * whole(width), room->widened = room->queries + QUERIES * width;
        room->keys = room->widened + COLUMNS * width, room->logits = room->keys + COLUMNS * width;
        memset(room->values, 0, SPAN * whole(width) * sizeof *room->values);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) enter(a, p, norms, t, qkv, cos, sin, q, k, v, half, kept);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < all; i++) {
            const int64_t first = from[i % count], kv_head = i / count / parts, at = i / count % parts * heads;
            const Group g = {first, grouped(a, p, first, tokens, most), kv_head, kv_head * group + at,
                             group - at < heads ? group - at : heads};
            const int64_t later = i + threads < all ? i + threads : i; /* this thread's next, or about that */
            const Group after = {.first = from[later % count], .kv_head = later / count / parts};
#define IN(width, kept, pairs) group_in(a, p, &g, &after, q, k, v, out, room, width, half, kept, pairs)
            if (pairs && kept == KEPT_INT8) IN(width, KEPT_INT8, 1);
            else if (pairs && kept == KEPT_INT4) IN(width, KEPT_INT4, 1);
            else if (pairs && width == 64) IN(64, KEPT_BFLOAT16, 1);
            else if (pairs) IN(width, KEPT_BFLOAT16, 1);
            else if (width == 64 && kept == KEPT_BFLOAT16) IN(64, KEPT_BFLOAT16, 0);
            else if (kept == KEPT_INT8) IN(width, KEPT_INT8, 0);
            else if (kept == KEPT_INT4) IN(width, KEPT_INT4, 0);
            else IN(width, kept, 0);
#undef IN
        }
    }
    free(memory);
    return 0;
}

/* qkv [tokens, heads + 2 kv_heads, width], where width is a multiple of 8 and at most 512; cos, sin [tokens, turning];
   k, v as `kept` says, never float32 where all else is bfloat16; out [tokens, heads, width]. Gives 0, or 1 where memory
   ran out. */
int attend(const Shape *a, const Places *p, const HeadNorms *norms, int64_t tokens, const void *qkv, const void *cos,
           const void *sin, void *k, void *v, void *out, int half, int kept, int threads) {
    if (half && kept == KEPT_BFLOAT16 && unit_attends(a))
        return unit_attend(a, p, norms, tokens, qkv, cos, sin, k, v, out, threads);
    const int pairs = half && multiplies_pairs() && a->width % (2 * MANY) == 0;
    return attend_in(a, p, norms, tokens, qkv, cos, sin, k, v, out, half, kept, pairs, threads);
}
