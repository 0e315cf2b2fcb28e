/* Products of many rows in fp32, x86 with AVX2 and FMA: six rows with a tile of outputs at a time. */
#include <immintrin.h>

#include "panel_lines.h"

#define rapid_exponentials exponentials
#include "chunk_rows.h"

#define ROWS 6
#define STEP 16 /* columns */

static void pack(const struct many *many, const void *x, int dtype, int64_t stride, int64_t rows, int64_t columns, float unit,
                 const struct packed *packed, int64_t tile) {
    (void)many, (void)unit;
    for (int64_t row = 0; row < TILE; row++)
        for (int64_t step = 0; step < packed->steps; step++) {
            float values[STEP] = {0};
            int64_t start = step * STEP, left = columns - start;
            if (row < rows) load_values(x, dtype, row * stride + start, left < STEP ? (int)left : STEP, values);
            memcpy(packed->tiles + (tile * packed->steps + step) * STEP_TILE + row * STEP_BYTES, values, STEP_BYTES);
        }
}

/* A column of eight outputs: codes are the lowest bits of each. */
ALWAYS_INLINE void store_nf4(__m256i codes, __m256 scale, uint8_t *out) {
    __m256 lower = _mm256_permutevar8x32_ps(_mm256_loadu_ps(nf4_table), codes); /* looks at three bits */
    __m256 upper = _mm256_permutevar8x32_ps(_mm256_loadu_ps(nf4_table + 8), codes);
    __m256 value = _mm256_blendv_ps(lower, upper, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
    _mm256_storeu_ps((float *)out, _mm256_mul_ps(value, scale));
}

ALWAYS_INLINE void nf4_to_fp32(const uint8_t *codes, int64_t count, uint8_t *out) {
    for (int64_t group = 0; group < count / GROUP; group++, codes += GROUP_LINES * LINE)
        for (int line = 0; line < 8; line++, out += 8 * LINE)
            for (int half = 0; half < LINE; half += 32) {
                __m256 scale = _mm256_loadu_ps((const float *)(codes + 8 * LINE + half));
                __m256i all = _mm256_loadu_si256((const __m256i *)(codes + line * LINE + half));
                for (int column = 0; column < 4; column++, all = _mm256_srli_epi32(all, 8)) {
                    store_nf4(all, scale, out + column * LINE + half);
                    store_nf4(_mm256_srli_epi32(all, 4), scale, out + (4 + column) * LINE + half);
                }
            }
}

ALWAYS_INLINE void int8_to_fp32(const uint8_t *codes, const float *scales, int64_t count, uint8_t *out) {
    for (int64_t line = 0; line < count / 4; line++, codes += LINE, out += 4 * LINE)
        for (int half = 0; half < LINE; half += 32) {
            __m256i all = _mm256_loadu_si256((const __m256i *)(codes + half));
            __m256 scale = _mm256_loadu_ps(scales + half / 4);
            for (int column = 0; column < 4; column++) {
                __m256i code = _mm256_srai_epi32(_mm256_slli_epi32(all, 24 - 8 * column), 24);
                _mm256_storeu_ps((float *)(out + column * LINE + half), _mm256_mul_ps(_mm256_cvtepi32_ps(code), scale));
            }
        }
}

static void expand(const struct many *many, const struct expansion *expansion) {
    (void)many;
    expand_values(expansion, 1, nf4_to_fp32, int8_to_fp32);
}

ALWAYS_INLINE void multiply_rows(const int rows, const uint8_t *x, int64_t steps, const uint8_t *lines, float *sums, int add) {
    __m256 all[ROWS][2];
    for (int row = 0; row < rows; row++)
        for (int i = 0; i < 2; i++) all[row][i] = add ? _mm256_loadu_ps(sums + row * PANEL + i * 8) : _mm256_setzero_ps();
    for (int64_t step = 0; step < steps; step++, x += STEP_TILE, lines += STEP * LINE)
#pragma GCC unroll 4
        for (int line = 0; line < STEP; line++) {
            __m256 first = _mm256_loadu_ps((const float *)(lines + line * LINE));
            __m256 second = _mm256_loadu_ps((const float *)(lines + line * LINE + 32));
#pragma GCC unroll 6
            for (int row = 0; row < rows; row++) {
                __m256 column = _mm256_broadcast_ss((const float *)(x + row * STEP_BYTES) + line);
                all[row][0] = _mm256_fmadd_ps(first, column, all[row][0]);
                all[row][1] = _mm256_fmadd_ps(second, column, all[row][1]);
            }
        }
    for (int row = 0; row < rows; row++)
        for (int i = 0; i < 2; i++) _mm256_storeu_ps(sums + row * PANEL + i * 8, all[row][i]);
}

static void multiply(const struct many *many, const struct packed *packed, int64_t tile, int64_t rows,
                     const struct slab *slab, float *sums, int add, const struct expansion *next) {
    for (int64_t t = 0; t < PANEL_TILES; t++)
        for (int64_t row = 0; row < parts(rows, TILE) * TILE; row += row % TILE == 2 * ROWS ? TILE - 2 * ROWS : ROWS) {
            int64_t step = (tile + row / TILE) * packed->steps + slab->first;
            const uint8_t *x = packed->tiles + step * STEP_TILE + row % TILE * STEP_BYTES;
            const uint8_t *lines = slab->lines + t * TILE_LINES;
            float *target = sums + row * PANEL + t * TILE;
            if (row % TILE == 2 * ROWS)
                multiply_rows(TILE - 2 * ROWS, x, slab->steps, lines, target, add);
            else
                multiply_rows(ROWS, x, slab->steps, lines, target, add);
        }
    if (next) expand(many, next);
}

static int64_t spin(int64_t rounds) {
    __m256 ones = _mm256_set1_ps(1.0f), sums[12];
    for (int i = 0; i < 12; i++) sums[i] = _mm256_setzero_ps();
    for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++) sums[i] = _mm256_fmadd_ps(ones, ones, sums[i]);
        __asm__ volatile("" : "+x"(ones));
    }
    for (int i = 1; i < 12; i++) sums[0] = _mm256_add_ps(sums[0], sums[i]);
    __asm__ volatile("" : "+x"(sums[0]));
    return 12 * 8 * 2;
}

/* A row's scores of 64 keys, of which first to last are seen, to weights, a step's tiles apart; updates the largest and the
 * sum so far and returns what earlier results shrink by. */
static float weigh(const float *scores, int first, int last, float *largest, float *total, uint8_t *weights) {
    const lanes number = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const lanes nothing = (lanes){0} - __builtin_inff();
    float before = *largest, now = before, parts_of[LANES];
    integer_lanes seen[KEYS / LANES];
    lanes of[KEYS / LANES], most = nothing, sums = {0};
    for (int i = 0; i < KEYS / LANES; i++) {
        lanes key = number + (float)(i * LANES);
        seen[i] = (key >= (float)first) & (key < (float)last);
        of[i] = chosen(seen[i], load_lanes(scores + i * LANES), nothing);
        most = larger(most, of[i]);
    }
    store_lanes(parts_of, most);
    for (int i = 0; i < LANES; i++) now = parts_of[i] > now ? parts_of[i] : now;
    for (int i = 0; i < KEYS / LANES; i++) {
        of[i] = chosen(seen[i], exponentials(of[i] - now), (lanes){0});
        store_lanes((float *)(weights + i * STEP_TILE), of[i]);
        sums += of[i];
    }
    float shrink = shrinking(before, now);
    *largest = now;
    *total = *total * shrink + sum_of_lanes(sums);
    return shrink;
}

/* Keys of a block as lines of a panel: a column of 16 keys in each. */
static void lay_keys(const uint16_t *const *keys, int count, int width, uint8_t *lines) {
    for (int i = 0; i < KEYS; i++) {
        float *out = (float *)(lines + i / TILE * TILE_LINES) + i % TILE;
        for (int column = 0; column < parts(width, STEP) * STEP; column++, out += LINE / 4)
            *out = i < count && column < width ? from_bf16(keys[i][column]) : 0.0f;
    }
}

/* 64 columns of values as lines of a panel: of a key each. */
static void lay_values(const uint16_t *const *values, int count, int columns, uint8_t *lines) {
    for (int key = 0; key < KEYS; key++) {
        float out[PANEL] = {0};
        if (key < count) load_values(values[key], BF16, 0, columns, out);
        for (int tile = 0; tile < PANEL_TILES; tile++)
            memcpy(lines + tile * TILE_LINES + key * LINE, out + tile * TILE, LINE);
    }
}

static const struct chunk_rows chunk_rows = {norm_row, turn_head,  add_panel, gate_panel,   0,             weigh,
                                             lay_keys, lay_values, scale_row, widen_values, narrow_values};

const struct many many_avx2fp32 = {"avx2fp32", FP32_PRODUCTS, 1, 0, 0, pack, expand, multiply, store_panel, spin, &chunk_rows};
