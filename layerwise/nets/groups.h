/* Tokens whose sequences begin with the same blocks, for instance all of a prompt: what several of them see in the same
   blocks is read once for all. Slots are read SPAN at a time, from places that are the same for all tokens. */

#pragma once

#include "native.h"

enum { SPAN = 64 };

/* The logit of a slot that a query does not see, far below what the largest one is at first. */
static const float HIDDEN = -1e36f, LOWEST = -1e30f;

/* What a token sees: slots from `from` to the one before `to`, in the blocks of `table`. */
typedef struct {
    const int64_t *table;
    int64_t token, row, from, to;
} Sight;

INLINE Sight sight_of(const Shape *a, const Places *p, int64_t token) {
    const int64_t row = p->row[token], kept = p->first[row] * a->block, end = p->place[token] + 1;
    const int64_t start = a->window && end - a->window > kept ? end - a->window : kept;
    return (Sight){p->table + row * p->columns - p->first[row], token, row, start, end};
}

/* The slots that tokens from `first` to the one before `stop` see, all together. */
typedef struct {
    int64_t from, to;
} Range;

INLINE Range range_of(const Sight *sights, int64_t first, int64_t stop) {
    Range all = {INT64_MAX, 0};
    for (int64_t t = first; t < stop; t++) {
        all.from = sights[t].from < all.from ? sights[t].from : all.from;
        all.to = sights[t].to > all.to ? sights[t].to : all.to;
    }
    return all;
}

/* Whether two tokens read the same SPAN slots from `span` on. */
INLINE int alike(const Sight *a, const Sight *b, int64_t span, int64_t block) {
    if (a->row == b->row) return 1;
    if (a->from > span || b->from > span || a->to < span + SPAN || b->to < span + SPAN) return 0;
    for (int64_t i = span / block; i <= (span + SPAN - 1) / block; i++)
        if (a->table[i] != b->table[i]) return 0;
    return 1;
}

/* As many tokens from place `first` of the order on as form a group, `most` at most: those that follow one another in a
   sequence, and those that see the first SPAN slots in the same blocks. */
INLINE int64_t grouped(const Shape *a, const Places *p, int64_t first, int64_t tokens, int64_t most) {
    const int64_t token = p->order[first], row = p->row[token], before = p->place[token] - first;
    const int64_t *table = p->table + row * p->columns;
    int64_t count = 1;
    for (; count < most && first + count < tokens; count++) {
        const int64_t next = p->order[first + count], other = p->row[next];
        if (other == row && p->place[next] == before + first + count) continue;
        if (a->window || p->first[row] || p->first[other]) break;
        if (p->place[token] + 1 < SPAN || p->place[next] + 1 < SPAN) break;
        if (memcmp(table, p->table + other * p->columns, (SPAN + a->block - 1) / a->block * sizeof *table)) break;
    }
    return count;
}
