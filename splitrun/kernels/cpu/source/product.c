/* The operators over whole matrices: products with few activation rows, and the values of rows. */
#include "convert.h"
#include "kernels.h"
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
};

/* A last tile with lines shorter than a register: group by group in full lines, with zeros for rows that do not exist. */
static void short_tile(const struct level *level, const struct weight *weight, const struct activations *all, int rows,
                       int64_t tile, float *sums) {
    struct place place = place_of(weight, tile * TILE);
    int nf4 = weight->format == NF4;
    int64_t lanes = lanes_of(weight, tile), line_columns = nf4 ? 8 : 4;
    for (int64_t start = 0; start < weight->columns; start += GROUP) {
        int64_t columns = weight->columns - start < GROUP ? weight->columns - start : GROUP;
        uint8_t lines[GROUP / 4 * LINE] = {0};
        float scales[TILE] = {0};
        for (int64_t line = 0; line < columns / line_columns; line++, place.codes += place.code_stride)
            memcpy(lines + line * LINE, place.codes, (size_t)lanes * 4);
        if (nf4) memcpy(scales, place.scales + start / GROUP * lanes, (size_t)lanes * 4);
        struct activations x = *all;
        x.codes += start;
        x.scales += start / GROUP;
        x.offsets += start / GROUP;
        (nf4 ? level->nf4_tile : level->int8_tile)(lines, scales, columns, &x, rows, sums);
    }
}

/* sums[row * TILE + lane] = the products of one tile with each activation row. */
void multiply_tile(const struct level *level, const struct weight *weight, const struct activations *x, int rows,
                   int64_t tile, float *sums) {
    int64_t lanes = lanes_of(weight, tile);
    struct place place = place_of(weight, tile * TILE);
    memset(sums, 0, sizeof(float) * TILE * (size_t)rows);
    if (lanes < TILE)
        short_tile(level, weight, x, rows, tile, sums);
    else if (weight->format == NF4)
        level->nf4_tile(place.codes, place.scales, weight->columns, x, rows, sums);
    else
        level->int8_tile(place.codes, 0, weight->columns, x, rows, sums);
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
    int64_t start, stop;
    float sums[MOST_ROWS * TILE];
    while (take(&product->shares, &start, &stop))
        for (int64_t tile = start; tile < stop; tile++) {
            multiply_tile(product->level, product->weight, &product->x, product->rows, tile, sums);
            finish_tile(product, tile, sums);
        }
}

static int64_t groups_of(int64_t columns) { return (columns + GROUP - 1) / GROUP; }

/* Bytes of scratch memory that splitrun_product wants. */
EXPORT int64_t splitrun_scratch_bytes(int64_t rows, int64_t columns) {
    return rows * groups_of(columns) * (GROUP + (int64_t)sizeof(float) + (int64_t)sizeof(int32_t));
}

/* out = x @ weight.T + bias. Shape: (rows, columns) -> (rows, weight rows), 1 to 16 rows, everything contiguous, x, bias
 * (or null) and out of one dtype. Rounded to the dtype once. */
EXPORT void splitrun_product(const struct level *level, const struct weight *weight, const void *x, int32_t dtype,
                             int32_t rows, const void *bias, void *out, void *scratch, int32_t threads) {
    int64_t groups = groups_of(weight->columns), width = dtype == FP32 ? 4 : 2;
    int64_t bytes = weight->rows * row_bytes(weight);
    float *scales = scratch;
    int32_t *offsets = (int32_t *)(scales + rows * groups);
    int8_t *codes = (int8_t *)(offsets + rows * groups);
    float unit = weight->format == NF4 ? (1.0f / 127.0f) * (1.0f / 127.0f) : 1.0f / 127.0f;
    struct product product = {level, weight, {codes, scales, offsets, groups * GROUP, groups}, rows, dtype, bias, out,
                              share((weight->rows + TILE - 1) / TILE, TILE * row_bytes(weight), threads)};
    for (int row = 0; row < rows; row++)
        quantize_row((const uint8_t *)x + row * weight->columns * width, dtype, weight->columns, unit,
                     codes + row * groups * GROUP, scales + row * groups, offsets + row * groups);
    run_team(bytes < ALONE_BYTES ? 1 : threads, multiply, &product);
}

struct lookup {
    const struct level *level;
    const struct weight *weight;
    const int64_t *ids;
    int64_t first, count;
    int dtype;
    uint8_t *out;
    struct shares shares;
};

static void look_up(void *argument) {
    struct lookup *lookup = argument;
    const struct weight *weight = lookup->weight;
    int64_t start, stop, width = lookup->dtype == FP32 ? 4 : 2;
    row_values *values = weight->format == NF4 ? lookup->level->nf4_row : lookup->level->int8_row;
    while (take(&lookup->shares, &start, &stop)) {
        int64_t last = stop * TILE < lookup->count ? stop * TILE : lookup->count;
        for (int64_t index = start * TILE; index < last; index++) {
            struct place place = place_of(weight, lookup->ids ? lookup->ids[index] : lookup->first + index);
            values(place.codes, place.code_stride, place.scales, place.scale_stride, weight->columns, lookup->dtype,
                   lookup->out + index * weight->columns * width);
        }
    }
}

/* The values of rows, exactly as the format defines them, rounded to the dtype once. Rows: ids[0..count), or with null
 * for ids first..first + count. Shape: (count, columns). Returns 0, or -1 (and does nothing) for a row that is not there.
 */
EXPORT int32_t splitrun_values(const struct level *level, const struct weight *weight, const int64_t *ids,
                               int64_t first, int64_t count, int32_t dtype, void *out, int32_t threads) {
    struct lookup lookup = {level, weight, ids, first, count, dtype, out,
                            share((count + TILE - 1) / TILE, TILE * row_bytes(weight), threads)};
    if (!ids && (first < 0 || first + count > weight->rows)) return -1;
    for (int64_t index = 0; ids && index < count; index++)
        if (ids[index] < 0 || ids[index] >= weight->rows) return -1;
    run_team(count * row_bytes(weight) < ALONE_BYTES ? 1 : threads, look_up, &lookup);
    return 0;
}

struct reading {
    const uint64_t *words;
    int64_t count;
    atomic_ullong sum;
    struct shares shares;
};

static void add_up(void *argument) {
    struct reading *reading = argument;
    int64_t start, stop;
    uint64_t sums[32] = {0};
    while (take(&reading->shares, &start, &stop))
        for (int64_t word = start * 512; word < stop * 512; word += 32)
            for (int i = 0; i < 32; i++) sums[i] += reading->words[word + i];
    for (int i = 0; i < 32; i++) atomic_fetch_add(&reading->sum, sums[i]);
}

/* Read memory and do next to nothing else: what benchmarks divide by. Whole pages of 4096 bytes. */
EXPORT uint64_t splitrun_read(const uint64_t *words, int64_t bytes, int32_t threads) {
    struct reading reading = {words, bytes / 8, 0, share(bytes / 4096, 4096, threads)};
    run_team(threads, add_up, &reading);
    return atomic_load(&reading.sum);
}
