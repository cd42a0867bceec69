/* Many rows times a matrix, dense in half precision or packed: y = x w' + bias, in float32. The numbers of COLUMNS outputs,
   widened, are turned over, so that they form a panel, once for all rows near. A row's numbers do not depend on how many
   rows there are. */

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

/* Numbers of COLUMNS whole outputs of bfloat16, from number `from` on; those of the next panel are fetched on the way into
   the second cache, as no hardware looks beyond a page. */
static void whole_panel(const Matrix *w, int64_t o, int64_t from, int64_t steps, float *panel) {
    for (int64_t j = 0; j < COLUMNS; j += SIXTEEN) {
        const bf16 *rows[SIXTEEN], *first = (const bf16 *)w->codes + (o + j) * w->inputs + from;
        for (int64_t n = 0; n < SIXTEEN; n++) rows[n] = first + n * w->inputs;
        for (int64_t i = 0; i < steps; i += MANY) {
            if (i % (LINE / 2) == 0)
                for (int64_t n = 0; n < SIXTEEN; n++) __builtin_prefetch(rows[n] + COLUMNS * w->inputs + i, 0, 2);
            widen_over(rows, i, panel + i * COLUMNS + j);
        }
    }
}

/* The same for any outputs, those beyond the last one zero. There is `room` for as many. */
static void panel_of(const Matrix *w, int64_t o, int64_t from, int64_t steps, float *room, float *panel) {
    const int64_t whole = steps / MANY * MANY;
    if (w->kind == BFLOAT16 && o + COLUMNS <= w->outputs && whole == steps) {
        whole_panel(w, o, from, steps, panel);
        return;
    }
    memset(room, 0, COLUMNS * steps * sizeof *room);
    for (int64_t j = 0; j < COLUMNS && o + j < w->outputs; j++) widen(w, o + j, from, steps, room + j * steps);
    for (int64_t j = 0; j < COLUMNS; j += MANY) {
        for (int64_t i = 0; i < whole; i += MANY) turn_over(room + j * steps + i, steps, panel + i * COLUMNS + j);
        for (int64_t i = whole; i < steps; i++)
            for (int64_t n = j; n < j + MANY; n++) panel[i * COLUMNS + n] = room[n * steps + i];
    }
}

/* Where a panel's products go: `outputs` columns of y, whose rows lie `stride` apart, beginning with `bias`. */
typedef struct {
    float *y;
    int64_t stride, outputs;
    const float *bias;
} Goal;

/* What `count` rows of x, `apart`, give with a panel is added to the rows of y from `m` on, or `first` to the bias. */
INLINE void rows_with_panel(const float *x, int64_t apart, const float *panel, int64_t steps, int count, Goal goal, int64_t m,
                            int first) {
    wide sum[ROWS_OF_SUMS][2];
#pragma GCC unroll 12
    for (int r = 0; r < count; r++) sum[r][0] = sum[r][1] = (wide){0};
    add_panel(x + m * apart, apart, panel, COLUMNS, steps, count, 0, sum);
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

static void all_rows(const float *x, int64_t rows, int64_t apart, const float *panel, int64_t steps, Goal goal, int first) {
    for (int64_t m = 0, some; m < rows; m += some) {
        some = rows_at_once(rows - m);
#define TAKE(n) rows_with_panel(x, apart, panel, steps, n, goal, m, first)
        WITH_ROWS(some, TAKE)
#undef TAKE
    }
}

/* Steps of every panel but the last one, about as many in each. */
static int64_t steps_of(const Matrix *w) {
    const int64_t whole = w->kind == BFLOAT16 || w->kind == FLOAT16 ? MANY : w->group;
    const int64_t parts = (w->inputs + STEPS - 1) / STEPS, even = (w->inputs + parts - 1) / parts;
    return (even + whole - 1) / whole * whole;
}

/* x [rows, inputs], y [rows, outputs] with rows `stride` apart. Gives 0, or 1 where memory ran out. */
int panel_product(const Matrix *w, const float *x, int64_t rows, const float *bias, float *y, int64_t stride,
                  int threads) {
    const int64_t inputs = w->inputs, outputs = w->outputs, most = steps_of(w), own = lines(2 * most * COLUMNS * sizeof *x);
    const int64_t near = NEAR / 4 / inputs / ROWS_OF_SUMS * ROWS_OF_SUMS, chunk = near > ROWS_OF_SUMS ? near : ROWS_OF_SUMS;
    const size_t none = lines(COLUMNS * sizeof *x);
    char *memory = aligned_alloc(LINE, none + threads * own);
    if (!memory) return 1;
    memset(memory, 0, none);
#pragma omp parallel num_threads(threads)
    {
        float *panel = (float *)(memory + none + omp_get_thread_num() * own), *room = panel + most * COLUMNS;
        for (int64_t m = 0; m < rows; m += chunk) {
            const int64_t here = rows - m < chunk ? rows - m : chunk;
#pragma omp for schedule(static)
            for (int64_t o = 0; o < outputs; o += COLUMNS) {
                const int64_t width = outputs - o < COLUMNS ? outputs - o : COLUMNS;
                const Goal goal = {y + m * stride + o, stride, width, bias ? bias + o : (float *)memory};
                for (int64_t from = 0; from < inputs; from += most) {
                    const int64_t steps = inputs - from < most ? inputs - from : most;
                    panel_of(w, o, from, steps, room, panel);
                    all_rows(x + m * inputs + from, here, inputs, panel, steps, goal, from == 0);
                }
            }
        }
    }
    free(memory);
    return 0;
}
