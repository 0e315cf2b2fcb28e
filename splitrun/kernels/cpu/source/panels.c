/* Products of many activation rows: packing, then tasks of some panels and some rows each. */
#include "panels.h"

#include "convert.h"
#include "layout.h"
#include "phases.h"

#define LINE_OF_MEMORY 64
#define FEWEST_ROWS 64 /* of a task: below it, expansion would cost as much as multiplication */

struct product {
    const struct many *many;
    const struct weight *weight;
    const void *x, *bias;
    void *out;
    int dtype;
    int64_t rows;
    struct portion portion;
    struct packed packed;
    uint8_t *benches;
    int threads;
    struct phase pack, multiply;
    struct team team;
    struct run_of_tasks multiply_runs[MOST_MEMBERS];
};

static int64_t aligned(int64_t bytes) { return parts(bytes, LINE_OF_MEMORY) * LINE_OF_MEMORY; }

static int64_t steps_of(const struct many *many, int64_t columns) { return parts(columns, step_columns(many)); }

static int64_t spans_of(const struct many *many, int64_t columns) {
    return has_scales(many) ? parts(columns, (int64_t)many->span * GROUP) : 0;
}

int64_t packed_bytes(const struct many *many, int64_t rows, int64_t columns) {
    int64_t tiles = parts(rows, TILE);
    return tiles * (steps_of(many, columns) * STEP_TILE + spans_of(many, columns) * TILE * 8);
}

/* Memory is aligned to lines and holds packed_bytes. */
struct packed packed_in(const struct many *many, int64_t rows, int64_t columns, uint8_t *memory) {
    int64_t tiles = parts(rows, TILE), steps = steps_of(many, columns), spans = spans_of(many, columns);
    float *scales = (float *)(memory + tiles * steps * STEP_TILE);
    struct packed packed = {memory, scales, (int32_t *)(scales + tiles * spans * TILE), steps, spans};
    return packed;
}

/* Lines and scales of two slabs, and the sums of a task. */
int64_t workbench_bytes(void) { return 2 * SLAB_BYTES + 2 * MOST_SPAN * PANEL * 4 + SUMS_AT_ONCE * 4; }

struct workbench workbench_in(uint8_t *memory) {
    float *scales = (float *)(memory + 2 * SLAB_BYTES);
    struct workbench bench = {{{memory, scales, 0, 0}, {memory + SLAB_BYTES, scales + MOST_SPAN * PANEL, 0, 0}},
                              scales + 2 * MOST_SPAN * PANEL};
    return bench;
}

/* What an activation scale is multiplied with, so that scales of weights need no further factor. */
float unit_of(const struct many *many, const struct weight *weight) {
    int wide = many->kind == INT16_PRODUCTS;
    float code = 1.0f / (wide ? WIDE_CODE : 127.0f), value = 1.0f / (wide ? WIDE_VALUE : 127.0f);
    return weight->format == NF4 ? code * value : code;
}

/* Where the columns of a panel from one on begin. */
static const uint8_t *codes_of(const struct expansion *one) {
    int64_t lines = one->weight->format == NF4 ? one->first / GROUP * GROUP_LINES : one->first / 4;
    return place_of(one->weight, one->panel * PANEL).codes + lines * LINE;
}

/* The index-th of a part's expansions: a slab of all its panels, of the weight and of the other, then the next slab. */
static struct expansion expansion_of(const struct many *many, const struct part *part, int64_t index,
                                     const struct workbench *bench) {
    int64_t all = part->panels * (part->other ? 2 : 1), own = index % all, most = slab_columns(many);
    int64_t first = index / all * most;
    struct expansion one = {own < part->panels ? part->weight : part->other, part->panel + own % part->panels, first,
                            part->weight->columns - first, 0, bench->slabs[index % 2]};
    one.count = one.count < most ? one.count : most;
    one.slab.first = first / step_columns(many);
    one.slab.steps = steps_of(many, one.count);
    return one;
}

/* The bench's sums = the products of a part, without `panel_scales`: those of the weight, then those of the other. */
void multiply_part(const struct many *many, const struct part *part, const struct packed *packed,
                   const struct workbench *bench) {
    int64_t all = part->panels * (part->other ? 2 : 1);
    int64_t count = all * parts(part->weight->columns, slab_columns(many));
    struct expansion now = expansion_of(many, part, 0, bench), next, later;
    many->expand(many, &now);
    next = expansion_of(many, part, 1, bench);
    for (int64_t index = 0; index < count; index++, now = next, next = later) {
        later = expansion_of(many, part, index + 2, bench);
        if (index + 2 < count) next.ahead = codes_of(&later) - codes_of(&next);
        many->multiply(many, packed, part->first_row / TILE, part->rows, &now.slab,
                       bench->sums + index % all * sums_of(part->rows), index >= all, index + 1 < count ? &next : 0);
    }
}

int64_t panel_outputs(const struct weight *weight, int64_t panel) {
    int64_t left = weight->rows - panel * PANEL;
    return left < PANEL ? left : PANEL;
}

/* What remains to multiply the sums of a panel with: scales of rows, of integers with int8 weights; else null. */
const float *panel_scales(const struct many *many, const struct weight *weight, int64_t panel, float *copy) {
    if (!has_scales(many) || weight->format == NF4) return 0;
    memset(copy, 0, PANEL * sizeof(float));
    memcpy(copy, weight->scales + panel * PANEL, (size_t)panel_outputs(weight, panel) * sizeof(float));
    return copy;
}

static void finish(const struct product *product, int64_t panel, int64_t first_row, int64_t rows, float *sums) {
    const struct weight *weight = product->weight;
    int64_t first = panel * PANEL, outputs = panel_outputs(weight, panel);
    float bias[PANEL] = {0}, scales[PANEL];
    if (product->bias) load_values(product->bias, product->dtype, first, (int)outputs, bias);
    product->many->store(sums, rows, outputs, panel_scales(product->many, weight, panel, scales),
                         product->bias ? bias : 0, product->dtype, product->out, first_row * weight->rows + first,
                         weight->rows);
}

static void work(void *argument) {
    struct product *product = argument;
    const struct many *many = product->many;
    int64_t task, panels = weight_panels(product->weight), columns = product->weight->columns;
    struct seat seat = take_seat(&product->team.arrived, product->threads);
    struct workbench bench = workbench_in(product->benches + seat.bench * workbench_bytes());
    if (many->enter) many->enter();
    while ((task = next_task(&product->pack, seat.member)) >= 0) {
        int64_t row = task * TILE, rows = product->rows - row < TILE ? product->rows - row : TILE;
        int64_t width = product->dtype == FP32 ? 4 : 2;
        many->pack(many, (const uint8_t *)product->x + row * columns * width, product->dtype, columns, rows, columns,
                   unit_of(many, product->weight), &product->packed, task);
        task_done(&product->pack);
    }
    wait_for(&product->pack);
    while ((task = next_task(&product->multiply, seat.member)) >= 0) {
        int64_t groups = parts(panels, product->portion.panels);
        struct part part = part_of(product->weight, 0, &product->portion, product->rows, task / groups, task % groups);
        multiply_part(many, &part, &product->packed, &bench);
        for (int64_t i = 0; i < part.panels; i++)
            finish(product, part.panel + i, part.first_row, part.rows, bench.sums + i * sums_of(part.rows));
    }
    if (many->leave) many->leave();
}

/* The group-th panels with the block-th rows. */
struct part part_of(const struct weight *weight, const struct weight *other, const struct portion *portion, int64_t rows,
                    int64_t block, int64_t group) {
    int64_t panel = group * portion->panels, panels = weight_panels(weight) - panel, first = block * portion->rows;
    struct part part = {weight, other, panel, panels < portion->panels ? panels : portion->panels, first,
                        rows - first < portion->rows ? rows - first : portion->rows};
    return part;
}

/* Rows and panels of a task: many, so that a panel is expanded seldom and activations come from afar seldom, but few enough
 * to give every thread several tasks. Blocks of rows are about equal. */
struct portion portion_of_task(const struct many *many, int64_t rows, int64_t panels, int64_t most_panels, int64_t threads) {
    int64_t most = many->kind == INT8_PRODUCTS ? ROWS_AT_ONCE : ROWS_AT_ONCE / 2;
    struct portion portion = {parts(parts(rows, parts(rows, most)), 2 * TILE) * 2 * TILE, most_panels};
    int64_t wanted = threads > 1 ? 3 * threads : 1;
    while (portion.panels > 1 && parts(rows, portion.rows) * parts(panels, portion.panels) < wanted) portion.panels /= 2;
    while (portion.rows > FEWEST_ROWS && parts(rows, portion.rows) * parts(panels, portion.panels) < wanted)
        portion.rows = parts(portion.rows / 2, TILE) * TILE;
    return portion;
}

/* Bytes of scratch memory that splitrun_many_product wants; its address is aligned here. */
EXPORT int64_t splitrun_many_scratch_bytes(const struct many *many, int64_t rows, int64_t columns, int64_t threads) {
    return packed_bytes(many, rows, columns) + threads * workbench_bytes() + LINE_OF_MEMORY;
}

/* out = x . weight + bias in the dtype. Shape: (rows, columns) -> (rows, weight rows); bias may be null. */
EXPORT void splitrun_many_product(const struct many *many, const struct weight *weight, const void *x, int32_t dtype,
                                  int64_t rows, const void *bias, void *out, void *scratch, int32_t threads) {
    uint8_t *memory = (uint8_t *)aligned((int64_t)(uintptr_t)scratch);
    int64_t panels = weight_panels(weight);
    struct portion portion = portion_of_task(many, rows, panels, panels_at_once(many), threads);
    struct product product = {.many = many, .weight = weight, .x = x, .bias = bias, .out = out, .dtype = dtype,
                              .rows = rows, .portion = portion, .threads = threads};
    product.packed = packed_in(many, rows, weight->columns, memory);
    product.benches = memory + packed_bytes(many, rows, weight->columns);
    open_phase(&product.pack, parts(rows, TILE), members_of(threads), product.team.runs);
    open_phase(&product.multiply, parts(panels, portion.panels) * parts(rows, portion.rows), members_of(threads),
               product.multiply_runs);
    run_team(threads, work, &product);
}

struct spinning {
    const struct many *many;
    int64_t rounds;
    atomic_llong operations;
};

static void spin(void *argument) {
    struct spinning *spinning = argument;
    if (spinning->many->enter) spinning->many->enter();
    atomic_fetch_add(&spinning->operations, spinning->rounds * spinning->many->spin(spinning->rounds));
    if (spinning->many->leave) spinning->many->leave();
}

/* Operations (a multiplication and an addition are two) that all threads did in registers: benchmarks time it. */
EXPORT int64_t splitrun_many_spin(const struct many *many, int64_t rounds, int32_t threads) {
    struct spinning spinning = {.many = many, .rounds = rounds};
    run_team(threads, spin, &spinning);
    return atomic_load(&spinning.operations);
}
