/* `outputs_of` by the `output` that the file which includes this has defined. */

/* A few outputs at a time, so that what is the same for all of them is found once. */
INLINE void outputs_in(const Matrix *w, int64_t from, int64_t to, int rows, Fixed x, float y[TILE][MOST_ROWS], int kind,
                       int64_t group) {
    for (int64_t o = from; o < to; o++) output(w, o, rows, x, y[o - from], kind, group);
}

#define OF_KIND(n)                                                                                 \
    if (w->kind == NIBBLES && w->group == PIECE) outputs_in(w, from, to, n, x, y, NIBBLES, PIECE); \
    else if (w->kind == NIBBLES) outputs_in(w, from, to, n, x, y, NIBBLES, w->group);              \
    else if (w->kind == BYTES) outputs_in(w, from, to, n, x, y, BYTES, w->group);                  \
    else outputs_in(w, from, to, n, x, y, SIGNED_BYTES, w->group)

void outputs_of(const Matrix *w, int64_t from, int64_t to, int rows, const Fixed x, float y[TILE][MOST_ROWS]) {
    if (rows == 1) { OF_KIND(1); }
    else if (rows == 2) { OF_KIND(2); }
    else if (rows == 3) { OF_KIND(3); }
    else { OF_KIND(4); }
}
