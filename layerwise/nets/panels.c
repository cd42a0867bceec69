/* Many rows times a matrix, dense in half precision or packed: y = x w' + bias, in float32, or in bfloat16 with sums in
   float32. The numbers of COLUMNS outputs are turned over, so that they form a panel, once for all rows near: widened, or
   pair by pair as they are. A row's numbers do not depend on how many rows there are. */

#include "packed.h"
#include "wide.h"

#include <omp.h>

/* Steps of a panel at most, and bytes of x that meet all panels before the next: what stays near. */
enum { STEPS = 1024, NEAR = 1 << 20 };

/* Some numbers of output `o`, from number `from` on. */
static void widen(const Matrix *w, int64_t o, int64_t from, int64_t count, float *to) {
    if (w->kind != BFLOAT16 && w->kind != FLOAT16) {
        for (int64_t i = 0; i < count; i += w->group) numbers_of(w, o, (from + i) / w->group, to + i);
        return;
    }
    const bf16 *numbers = (const bf16 *)w->codes + o * w->inputs + from;
    if (w->kind == BFLOAT16)
        for (int64_t i = 0; i < count; i++) to[i] = widened(numbers[i]);
    else
        for (int64_t i = 0; i < count; i++) to[i] = half_value(numbers[i], FLOAT16);
}

/* Numbers of COLUMNS whole outputs of bfloat16, from number `from` on; those of the next panel are fetched on the way, as no
   hardware looks beyond a page. */
INLINE void whole_panel(const Matrix *w, int64_t o, int64_t from, int64_t steps, int half, float *panel) {
    for (int64_t j = 0; j < COLUMNS; j += SIXTEEN) {
        const bf16 *rows[SIXTEEN], *first = (const bf16 *)w->codes + (o + j) * w->inputs + from;
        for (int64_t n = 0; n < SIXTEEN; n++) rows[n] = first + n * w->inputs;
        for (int64_t i = 0; i < steps; i += MANY) {
            const int64_t at = half ? 2 * i : i;
            if (at % (LINE / 2) == 0)
                for (int64_t n = 0; n < SIXTEEN; n++) __builtin_prefetch(rows[n] + COLUMNS * w->inputs + at);
            float *to = panel + i * COLUMNS + j;
            if (!half) widen_over(rows, at, to);
            else
                for (int64_t n = 0; n < SIXTEEN; n += MANY)
                    turn_over((const float *)(rows[n] + at), w->inputs / 2, to + n);
        }
    }
}

/* The same for any outputs, those beyond the last one zero. There is `room` for as many and for one row in float32. */
static void panel_of(const Matrix *w, int64_t o, int64_t from, int64_t steps, int half, float *room, float *panel) {
    const int64_t whole = steps / MANY * MANY, count = half ? 2 * steps : steps;
    if (w->kind == BFLOAT16 && o + COLUMNS <= w->outputs && whole == steps) {
        if (half) whole_panel(w, o, from, steps, 1, panel);
        else whole_panel(w, o, from, steps, 0, panel);
        return;
    }
    float *row = room + COLUMNS * steps;
    memset(room, 0, COLUMNS * steps * sizeof *room);
    for (int64_t j = 0; j < COLUMNS && o + j < w->outputs; j++) {
        float *to = room + j * steps;
        widen(w, o + j, from, count, half ? row : to);
        for (int64_t i = 0; half && i < count; i++) put(to, i, row[i], 1);
    }
    for (int64_t j = 0; j < COLUMNS; j += MANY) {
        for (int64_t i = 0; i < whole; i += MANY) turn_over(room + j * steps + i, steps, panel + i * COLUMNS + j);
        for (int64_t i = whole; i < steps; i++)
            for (int64_t n = j; n < j + MANY; n++) memcpy(panel + i * COLUMNS + n, room + n * steps + i, sizeof *room);
    }
}

/* Where a panel's products go: `outputs` columns of y, whose rows lie `stride` apart, beginning with `bias`. */
typedef struct {
    float *y;
    int64_t stride, outputs;
    const float *bias;
} Goal;

/* What `count` rows of x, `apart`, give with a panel is added to the rows of y from `m` on, or `first` to the bias. */
INLINE void rows_with_panel(const float *x, int64_t apart, const float *panel, int64_t steps, int count, int half,
                            Goal goal, int64_t m, int first) {
    wide sum[ROWS_OF_SUMS][2];
#pragma GCC unroll 12
    for (int r = 0; r < count; r++) sum[r][0] = sum[r][1] = (wide){0};
    add_panel(x + m * apart, apart, panel, COLUMNS, steps, count, half, sum);
#pragma GCC unroll 12
    for (int r = 0; r < count; r++) {
        float *to = goal.y + (m + r) * goal.stride, edge[COLUMNS];
        const float *before = first ? goal.bias : to;
        if (goal.outputs == COLUMNS) {
            store_wide(to, load_wide(before) + sum[r][0]);
            store_wide(to + WIDE, load_wide(before + WIDE) + sum[r][1]);
            continue;
        }
        memcpy(edge, sum[r], sizeof edge);
        for (int64_t o = 0; o < goal.outputs; o++) to[o] = before[o] + edge[o];
    }
}

INLINE void all_rows(const float *x, int64_t rows, int64_t apart, const float *panel, int64_t steps, int half, Goal goal,
                     int first) {
    for (int64_t m = 0, some; m < rows; m += some) {
        some = rows_at_once(rows - m);
#define TAKE(n) rows_with_panel(x, apart, panel, steps, n, half, goal, m, first)
        WITH_ROWS(some, TAKE)
#undef TAKE
    }
}

/* Sums of rows become rows of y in bfloat16. */
static void narrow_rows(Goal from, int64_t rows, bf16 *y, int64_t stride) {
    for (int64_t m = 0; m < rows; m++) {
        const float *sums = from.y + m * from.stride;
        int64_t o = 0;
        for (; o + MANY <= from.outputs; o += MANY) put_many(y + m * stride, o, load_many(sums + o), 1);
        for (; o < from.outputs; o++) put(y + m * stride, o, sums[o], 1);
    }
}

/* Steps of every panel but the last one, about as many in each. */
static int64_t steps_of(const Matrix *w, int half) {
    const int64_t size = half ? 2 : 1, dense = w->kind == BFLOAT16 || w->kind == FLOAT16;
    const int64_t whole = dense ? MANY : w->group / size, all = w->inputs / size;
    const int64_t parts = (all + STEPS - 1) / STEPS, even = (all + parts - 1) / parts;
    return (even + whole - 1) / whole * whole;
}

/* Whether there are instructions for pairs of bfloat16, and only whole pairs of inputs. */
int panels_multiply_pairs(int64_t inputs) { return multiplies_pairs() && inputs % 2 == 0; }

/* x [rows, inputs], y [rows, outputs] with rows `stride` apart: float32, or bfloat16 where `half`, with an even number of
   inputs. Gives 0, or 1 where memory ran out. */
int panel_product(const Matrix *w, const void *x, int64_t rows, const float *bias, void *y, int64_t stride, int half,
                  int threads) {
    const int64_t outputs = w->outputs, most = steps_of(w, half), all = half ? w->inputs / 2 : w->inputs;
    const int64_t near = NEAR / 4 / all / ROWS_OF_SUMS * ROWS_OF_SUMS, some = near > ROWS_OF_SUMS ? near : ROWS_OF_SUMS;
    const int64_t chunk = rows < some ? rows : some, own = 2 * most * COLUMNS + (half ? 2 * most + chunk * COLUMNS : 0);
    const int64_t mine = (own + LINE / 4 - 1) / (LINE / 4) * (LINE / 4);
    float *memory = aligned_alloc(LINE, lines((COLUMNS + threads * mine) * sizeof *memory));
    if (!memory) return 1;
    memset(memory, 0, COLUMNS * sizeof *memory);
#pragma omp parallel num_threads(threads)
    {
        float *panel = memory + COLUMNS + omp_get_thread_num() * mine, *room = panel + most * COLUMNS;
        float *sums = room + most * COLUMNS + 2 * most;
        for (int64_t m = 0; m < rows; m += chunk) {
            const int64_t here = rows - m < chunk ? rows - m : chunk;
            const float *of = (const float *)x + m * all;
#pragma omp for schedule(static)
            for (int64_t o = 0; o < outputs; o += COLUMNS) {
                const int64_t width = outputs - o < COLUMNS ? outputs - o : COLUMNS;
                Goal goal = {(float *)y + m * stride + o, stride, width, bias ? bias + o : memory};
                if (half) goal.y = sums, goal.stride = COLUMNS;
                for (int64_t from = 0; from < all; from += most) {
                    const int64_t steps = all - from < most ? all - from : most;
                    panel_of(w, o, half ? 2 * from : from, steps, half, room, panel);
                    if (half) all_rows(of + from, here, all, panel, steps, 1, goal, from == 0);
                    else all_rows(of + from, here, all, panel, steps, 0, goal, from == 0);
                }
                if (half) narrow_rows(goal, here, (bf16 *)y + m * stride + o, stride);
            }
        }
    }
    free(memory);
    return 0;
}
