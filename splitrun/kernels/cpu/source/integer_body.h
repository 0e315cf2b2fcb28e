/* Products of many rows in 16-bit integers, with activations, weights and sums as panels.h has them. The including file
 * defines a register of int32 sums (`words`), the outputs that it holds (WORDS), and add_pairs(sums, weights, activations):
 * to each sum the products of two columns. Needs AVX2. */
#include <immintrin.h>

#include "panel_lines.h"

#define SMALLEST 1e-30f /* as in vectors.h */
#define ROWS 6 /* at a time: with two registers of outputs, twelve sums wait for each other's instructions */
#define GROUP_STEPS 2
#define GROUP_TILES (2 * STEP_TILE)

/* The same as quantize_row, to codes of 16 bits. Shape: (GROUP,) -> (GROUP,) in two steps. */
ALWAYS_INLINE void round_group(const float *values, float unit, uint8_t *codes, float *scale) {
    int32_t largest = 0;
    for (int i = 0; i < GROUP; i++) {
        int32_t magnitude = (int32_t)(bits_of(values[i]) & 0x7fffffff);
        largest = magnitude > largest ? magnitude : largest;
    }
    int used = largest < 0x7f800000 && float_of((uint32_t)largest) >= SMALLEST;
    float inverse = used ? WIDE_CODE / float_of((uint32_t)largest) : 0.0f;
    *scale = used ? float_of((uint32_t)largest) * unit : largest >= 0x7f800000 ? float_of(0x7fc00000) : 0.0f;
    for (int start = 0; start < GROUP; start += 32, codes += STEP_TILE) {
        int16_t rounded[32];
        for (int i = 0; i < 32; i++) {
            float value = used ? values[start + i] * inverse : 0.0f;
            rounded[i] = (int16_t)(int32_t)((value + ROUNDING) - ROUNDING);
        }
        memcpy(codes, rounded, STEP_BYTES);
    }
}

/* Columns behind the last are zeros, in whole groups but for a step that the row does not have. */
static void pack(const struct many *many, const void *x, int dtype, int64_t stride, int64_t rows, int64_t columns, float unit,
                 const struct packed *packed, int64_t tile) {
    (void)many;
    for (int64_t row = 0; row < TILE; row++)
        for (int64_t group = 0; group < packed->spans; group++) {
            float values[GROUP] = {0};
            uint8_t codes[GROUP_TILES];
            int64_t start = group * GROUP, left = columns - start, step = group * GROUP_STEPS;
            if (row < rows) load_values(x, dtype, row * stride + start, left < GROUP ? (int)left : GROUP, values);
            round_group(values, unit, codes, packed->scales + (tile * packed->spans + group) * TILE + row);
            for (int64_t i = 0; i < GROUP_STEPS && step + i < packed->steps; i++)
                memcpy(packed->tiles + (tile * packed->steps + step + i) * STEP_TILE + row * STEP_BYTES,
                       codes + i * STEP_TILE, STEP_BYTES);
        }
}

/* Four columns of eight outputs, as pairs of int16 of four outputs in each register, to two lines. */
ALWAYS_INLINE void store_pairs(__m256i lower, __m256i upper, uint8_t *out) {
    __m256 first = _mm256_castsi256_ps(lower), second = _mm256_castsi256_ps(upper);
    _mm256_storeu_ps((float *)out, _mm256_shuffle_ps(first, second, 0x88));
    _mm256_storeu_ps((float *)(out + LINE), _mm256_shuffle_ps(first, second, 0xdd));
}

/* Codes of four columns of eight outputs to two lines of values. */
ALWAYS_INLINE void nf4_columns(__m256i indices, __m256i low_bytes, __m256i high_bytes, uint8_t *out) {
    __m256i low = _mm256_shuffle_epi8(low_bytes, indices), high = _mm256_shuffle_epi8(high_bytes, indices);
    store_pairs(_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high), out);
}

ALWAYS_INLINE void nf4_to_int16(const uint8_t *codes, int64_t groups, uint8_t *out, float *scales) {
    const __m256i low_half = _mm256_set1_epi8(15);
    const __m128i *book = (const __m128i *)nf4_wide_codes, byte = _mm_set1_epi16(255);
    const __m128i first = _mm_loadu_si128(book), second = _mm_loadu_si128(book + 1);
    const __m256i low_bytes = _mm256_broadcastsi128_si256(
        _mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(second, byte)));
    const __m256i high_bytes = _mm256_broadcastsi128_si256(
        _mm_packs_epi16(_mm_srai_epi16(first, 8), _mm_srai_epi16(second, 8)));
    for (int64_t group = 0; group < groups; group++, codes += LINE, scales += PANEL) {
        for (int line = 0; line < 8; line++, codes += LINE, out += 4 * LINE)
            for (int half = 0; half < LINE; half += 32) {
                __m256i both = _mm256_loadu_si256((const __m256i *)(codes + half));
                __m256i upper = _mm256_and_si256(_mm256_srli_epi16(both, 4), low_half);
                nf4_columns(_mm256_and_si256(both, low_half), low_bytes, high_bytes, out + half);
                nf4_columns(upper, low_bytes, high_bytes, out + 2 * LINE + half);
            }
        memcpy(scales, codes, LINE);
    }
}

ALWAYS_INLINE void int8_to_int16(const uint8_t *codes, int64_t count, uint8_t *out) {
    for (int64_t line = 0; line < count / 4; line++, codes += LINE, out += 2 * LINE)
        for (int half = 0; half < LINE; half += 32) {
            __m256i four = _mm256_loadu_si256((const __m256i *)(codes + half)), none = _mm256_setzero_si256();
            store_pairs(_mm256_srai_epi16(_mm256_unpacklo_epi8(none, four), 8),
                        _mm256_srai_epi16(_mm256_unpackhi_epi8(none, four), 8), out + half);
        }
}

static void expand(const struct many *many, const struct expansion *expansion) {
    const struct weight *weight = expansion->weight;
    const struct slab *slab = &expansion->slab;
    int64_t count = expansion->count, groups = parts(count, GROUP);
    struct lines lines;
    (void)many;
    for (int64_t i = 0; i < groups * PANEL; i++) slab->scales[i] = 1.0f;
    for (int64_t t = 0; t < PANEL_TILES; t++) {
        uint8_t *out = slab->lines + t * TILE_LINES;
        int64_t tile = expansion->panel * PANEL_TILES + t, used = tile * TILE < weight->rows ? count : 0;
        if (used) find_lines(weight, tile, expansion->first, count, &lines);
        if (used && weight->format == NF4) nf4_to_int16(lines.codes, groups, out, slab->scales + t * TILE);
        if (used && weight->format == INT8) int8_to_int16(lines.codes, count, out);
        clear_lines(out, used / 2, slab->steps * TILE);
    }
}

/* Some rows with two registers of outputs: from `lines`, scales and sums of the first on. */
ALWAYS_INLINE void multiply_rows(const int rows, const uint8_t *x, const float *x_scales, int64_t steps,
                                 const uint8_t *lines, const float *scales, float *sums, int add) {
    for (int64_t step = 0; step < steps; x_scales += TILE, scales += PANEL, add = 1) {
        int64_t stop = step + GROUP_STEPS < steps ? step + GROUP_STEPS : steps;
        words dots[ROWS][2];
        for (int row = 0; row < rows; row++) dots[row][0] = dots[row][1] = no_words();
        for (; step < stop; step++, x += STEP_TILE, lines += TILE * LINE)
#pragma GCC unroll 4
            for (int line = 0; line < TILE; line++) {
                words first = load_words(lines + line * LINE), second = load_words(lines + line * LINE + NEXT_WORDS);
#pragma GCC unroll 6
                for (int row = 0; row < rows; row++) {
                    words pair = same_words(x + row * STEP_BYTES + line * 4);
                    dots[row][0] = add_pairs(dots[row][0], first, pair);
                    dots[row][1] = add_pairs(dots[row][1], second, pair);
                }
            }
        for (int row = 0; row < rows; row++)
            for (int i = 0; i < 2; i++)
                add_scaled(dots[row][i], scales + i * WORDS, x_scales[row], sums + row * PANEL + i * WORDS, add);
    }
}

static void multiply(const struct many *many, const struct packed *packed, int64_t tile, int64_t rows,
                     const struct slab *slab, float *sums, int add, const struct expansion *next) {
    int64_t first_group = slab->first / GROUP_STEPS;
    for (int64_t output = 0; output < PANEL; output += 2 * WORDS)
        for (int64_t row = 0; row < parts(rows, TILE) * TILE; row += row % TILE == 2 * ROWS ? TILE - 2 * ROWS : ROWS) {
            int64_t of = tile + row / TILE, in = row % TILE;
            const uint8_t *x = packed->tiles + (of * packed->steps + slab->first) * STEP_TILE + in * STEP_BYTES;
            const float *x_scales = packed->scales + (of * packed->spans + first_group) * TILE + in;
            const uint8_t *lines = slab->lines + output / TILE * TILE_LINES;
            float *target = sums + row * PANEL + output;
            if (in == 2 * ROWS)
                multiply_rows(TILE - 2 * ROWS, x, x_scales, slab->steps, lines, slab->scales + output, target, add);
            else
                multiply_rows(ROWS, x, x_scales, slab->steps, lines, slab->scales + output, target, add);
        }
    if (next) expand(many, next);
}

static int64_t spin(int64_t rounds) {
    static const int16_t one[2] = {1, 1};
    words ones = same_words(one), sums[12];
    for (int i = 0; i < 12; i++) sums[i] = no_words();
    for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++) {
            sums[i] = add_pairs(sums[i], ones, ones);
            KEEP(ones); /* else the product is made once for all */
        }
    }
    for (int i = 1; i < 12; i++) sums[0] = add_pairs(sums[0], sums[i], ones);
    KEEP(sums[0]);
    return 12 * WORDS * 4;
}
