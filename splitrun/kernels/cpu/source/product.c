/* The operators over whole matrices: products with few activation rows, and the values of rows. */
#include "activations.h"
#include "layout.h"
#include "shares.h"

struct product {
    const struct level *level;
    const struct weight *weight;
    struct activations x;
    int rows, dtype;
    const void *bias;
    void *out;
    struct shares shares;
    struct team team;
};

/* A last tile with lines shorter than a register: group by group in full lines, with zeros for rows that do not exist. */
static void short_tile(const struct level *level, const struct weight *weight, const struct activations *all, int rows,
                       int64_t tile, float *sums) {
    struct place place = place_of(weight, tile * TILE);
    int nf4 = weight->format == NF4;
    int64_t lanes = lanes_of(weight, tile);
    for (int64_t start = 0; start < weight->columns; start += GROUP) {
        int64_t columns = weight->columns - start < GROUP ? weight->columns - start : GROUP;
        uint8_t lines[GROUP / 4 * LINE] = {0};
        for (int64_t line = 0; line < (nf4 ? GROUP_LINES : columns / 4); line++, place.codes += place.stride)
            memcpy(lines + line * LINE, place.codes, (size_t)lanes * 4);
        struct activations x = *all;
        x.codes += start;
        x.scales += start / GROUP;
        x.offsets += start / GROUP;
        (nf4 ? level->nf4_tile : level->int8_tile)(lines, columns, &x, rows, sums);
    }
}

/* sums[row * TILE + lane] = the products of one tile with each activation row. */
void multiply_tile(const struct level *level, const struct weight *weight, const struct activations *x, int rows,
                   int64_t tile, float *sums) {
    int64_t lanes = lanes_of(weight, tile);
    struct place place = place_of(weight, tile * TILE);
    if (weight->format >= BF16_ROWS) {
        level->dense_tile(place.codes, weight->format == BF16_ROWS ? BF16 : FP16, weight->columns, (int)lanes, x->values,
                          x->value_stride, rows, sums);
        return;
    }
    memset(sums, 0, sizeof(float) * TILE * (size_t)rows);
    if (lanes < TILE)
        short_tile(level, weight, x, rows, tile, sums);
    else if (weight->format == NF4)
        level->nf4_tile(place.codes, weight->columns, x, rows, sums);
    else
        level->int8_tile(place.codes, weight->columns, x, rows, sums);
    for (int row = 0; weight->format == INT8 && row < rows; row++)
        for (int64_t lane = 0; lane < lanes; lane++) sums[row * TILE + lane] *= weight->scales[tile * TILE + lane];
}

static void finish_tile(const struct product *product, int64_t tile, float *sums) {
    const struct weight *weight = product->weight;
    int64_t lanes = lanes_of(weight, tile), first = tile * TILE;
    for (int row = 0; row < product->rows; row++) {
        float *values = sums + row * TILE;
        if (product->bias)
            for (int64_t lane = 0; lane < lanes; lane++)
                values[lane] = values[lane] + load_value(product->bias, product->dtype, first + lane);
        store_values(values, product->dtype, row * weight->rows + first, (int)lanes, product->out);
    }
}

static void multiply(void *argument) {
    struct product *product = argument;
    int member = join_team(&product->team.arrived, product->shares.members);
    float sums[MOST_ROWS * TILE];
    for (int64_t task; (task = take(&product->shares, member)) >= 0;)
        for (int64_t tile = task * TILES; tile < (task + 1) * TILES && tile < tiles_of(product->weight); tile++) {
            multiply_tile(product->level, product->weight, &product->x, product->rows, tile, sums);
            finish_tile(product, tile, sums);
        }
}

/* Bytes of scratch memory that splitrun_product wants. */
EXPORT int64_t splitrun_scratch_bytes(int64_t rows, int64_t columns) { return rows * activation_bytes(columns); }

/* out = x @ weight.T + bias. Shape: (rows, columns) -> (rows, weight rows), 1 to 16 rows, everything contiguous, x, bias
 * (or null) and out of one dtype. Rounded to the dtype once. */
EXPORT void splitrun_product(const struct level *level, const struct weight *weight, const void *x, int32_t dtype,
                             int32_t rows, const void *bias, void *out, void *scratch, int32_t threads) {
    int64_t width = dtype == FP32 ? 4 : 2, bytes = weight->rows * row_bytes(weight), columns = weight->columns;
    struct product product = {.level = level, .weight = weight, .rows = rows, .dtype = dtype, .bias = bias, .out = out};
    product.x = activations_in(scratch, rows, columns);
    for (int row = 0; row < rows; row++)
        set_activations(level, weight->format, &product.x, row, 0, (const uint8_t *)x + row * columns * width, dtype, columns);
    threads = bytes < ALONE_BYTES ? 1 : threads;
    product.shares = share(tasks_of(tiles_of(weight)), members_of(threads), product.team.runs);
    run_team(threads, multiply, &product);
}

/* A row's largest result so far, and the lowest matrix row that gives it. NaN is larger than any number. */
struct largest {
    float value;
    int64_t id;
};

struct choice {
    const struct level *level;
    const struct weight *weight;
    struct activations x;
    int rows, dtype;
    struct largest *found; /* Shape: (members, rows) */
    struct shares shares;
    struct team team;
};

ALWAYS_INLINE void compare(struct largest *largest, float value, int64_t id) {
    int is_nan = value != value, was_nan = largest->value != largest->value;
    if (is_nan ? !was_nan || id < largest->id
               : !was_nan && (value > largest->value || (value == largest->value && id < largest->id)))
        *largest = (struct largest){value, id};
}

static void choose(void *argument) {
    struct choice *choice = argument;
    int member = join_team(&choice->team.arrived, choice->shares.members);
    struct largest found[MOST_ROWS];
    float sums[MOST_ROWS * TILE], rounded[TILE];
    float halves[TILE];
    for (int row = 0; row < choice->rows; row++) found[row] = (struct largest){-__builtin_inff(), INT64_MAX};
    for (int64_t task; (task = take(&choice->shares, member)) >= 0;)
        for (int64_t tile = task * TILES; tile < (task + 1) * TILES && tile < tiles_of(choice->weight); tile++) {
            int lanes = (int)lanes_of(choice->weight, tile);
            multiply_tile(choice->level, choice->weight, &choice->x, choice->rows, tile, sums);
            for (int row = 0; row < choice->rows; row++) {
                store_values(sums + row * TILE, choice->dtype, 0, lanes, halves);
                load_values(halves, choice->dtype, 0, lanes, rounded);
                for (int lane = 0; lane < lanes; lane++)
                    if (!(rounded[lane] < found[row].value)) compare(&found[row], rounded[lane], tile * TILE + lane);
            }
        }
    for (int row = 0; row < choice->rows; row++) choice->found[member * choice->rows + row] = found[row];
}

/* Bytes of scratch memory that splitrun_choose wants. */
EXPORT int64_t splitrun_choose_scratch_bytes(int64_t rows, int64_t columns, int32_t threads) {
    return rows * (members_of(threads) * (int64_t)sizeof(struct largest) + activation_bytes(columns));
}

/* Per row, the largest of the products with all matrix rows once they are rounded to the dtype, and the lowest matrix row
 * that has it: what a search through splitrun_product's results finds. Shape of x: (rows, columns), 1 to 16 rows; of
 * values and ids: (rows,). */
EXPORT void splitrun_choose(const struct level *level, const struct weight *weight, const void *x, int32_t dtype,
                            int32_t rows, float *values, int64_t *ids, void *scratch, int32_t threads) {
    int64_t width = dtype == FP32 ? 4 : 2, columns = weight->columns;
    threads = members_of(threads); /* so that no two threads are one member */
    struct choice choice = {.level = level, .weight = weight, .rows = rows, .dtype = dtype, .found = scratch};
    choice.x = activations_in(choice.found + threads * rows, rows, columns);
    for (int i = 0; i < threads * rows; i++) choice.found[i] = (struct largest){-__builtin_inff(), INT64_MAX};
    for (int row = 0; row < rows; row++)
        set_activations(level, weight->format, &choice.x, row, 0, (const uint8_t *)x + row * columns * width, dtype, columns);
    choice.shares = share(tasks_of(tiles_of(weight)), threads, choice.team.runs);
    run_team(threads, choose, &choice);
    for (int row = 0; row < rows; row++) {
        struct largest all = choice.found[row];
        for (int member = 1; member < threads; member++)
            compare(&all, choice.found[member * rows + row].value, choice.found[member * rows + row].id);
        values[row] = all.value;
        ids[row] = all.id;
    }
}

/* Rows divided by their root mean square, times a vector; rounded to the dtype once. Shape of x and out: (rows, columns);
 * scratch: as many floats as columns. */
EXPORT void splitrun_norm(const struct level *level, const void *x, const void *weight, int32_t dtype, int64_t rows,
                          int64_t columns, float epsilon, void *out, float *scratch) {
    for (int64_t row = 0; row < rows; row++) {
        load_values(x, dtype, row * columns, (int)columns, scratch);
        level->norm(scratch, weight, dtype, columns, epsilon, scratch);
        store_values(scratch, dtype, row * columns, (int)columns, out);
    }
}

struct lookup {
    const struct level *level;
    const struct weight *weight;
    const int64_t *ids;
    int64_t first, count;
    int dtype;
    uint8_t *out;
    struct shares shares;
    struct team team;
};

static void look_up(void *argument) {
    struct lookup *lookup = argument;
    const struct weight *weight = lookup->weight;
    int member = join_team(&lookup->team.arrived, lookup->shares.members);
    int64_t width = lookup->dtype == FP32 ? 4 : 2;
    row_values *values = weight->format == NF4 ? lookup->level->nf4_row : lookup->level->int8_row;
    for (int64_t task; (task = take(&lookup->shares, member)) >= 0;) {
        int64_t last = (task + 1) * TILE < lookup->count ? (task + 1) * TILE : lookup->count;
        for (int64_t index = task * TILE; index < last; index++) {
            int64_t row = lookup->ids ? lookup->ids[index] : lookup->first + index;
            struct place place = place_of(weight, row);
            values(place.codes, place.stride, weight->format == INT8 ? weight->scales[row] : 0.0f, weight->columns,
                   lookup->dtype, lookup->out + index * weight->columns * width);
        }
    }
}

/* The values of rows, exactly as the format defines them, rounded to the dtype once. Rows: ids[0..count), or with null
 * for ids first..first + count. Shape: (count, columns). Returns 0, or -1 (and does nothing) for a row that is not there.
 */
EXPORT int32_t splitrun_values(const struct level *level, const struct weight *weight, const int64_t *ids,
                               int64_t first, int64_t count, int32_t dtype, void *out, int32_t threads) {
    struct lookup lookup = {.level = level, .weight = weight, .ids = ids, .first = first, .count = count, .dtype = dtype};
    lookup.out = out;
    if (!ids && (first < 0 || first + count > weight->rows)) return -1;
    for (int64_t index = 0; ids && index < count; index++)
        if (ids[index] < 0 || ids[index] >= weight->rows) return -1;
    threads = count * row_bytes(weight) < ALONE_BYTES ? 1 : threads;
    lookup.shares = share((count + TILE - 1) / TILE, members_of(threads), lookup.team.runs);
    run_team(threads, look_up, &lookup);
    return 0;
}

struct reading {
    const uint64_t *words;
    atomic_ullong sum;
    struct shares shares;
    struct team team;
};

#define READ_WORDS 8192 /* of a task */

static void add_up(void *argument) {
    struct reading *reading = argument;
    int member = join_team(&reading->team.arrived, reading->shares.members);
    uint64_t sums[32] = {0};
    for (int64_t task; (task = take(&reading->shares, member)) >= 0;)
        for (int64_t word = task * READ_WORDS; word < (task + 1) * READ_WORDS; word += 32)
            for (int i = 0; i < 32; i++) sums[i] += reading->words[word + i];
    for (int i = 0; i < 32; i++) atomic_fetch_add(&reading->sum, sums[i]);
}

/* Read memory and do next to nothing else: what benchmarks divide by. Whole pieces of 64 KiB; a rest is left out. */
EXPORT uint64_t splitrun_read(const uint64_t *words, int64_t bytes, int32_t threads) {
    struct reading reading = {.words = words};
    reading.shares = share(bytes / 8 / READ_WORDS, members_of(threads), reading.team.runs);
    run_team(threads, add_up, &reading);
    return atomic_load(&reading.sum);
}
