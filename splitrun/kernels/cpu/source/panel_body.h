/* Packing of activations and expansion of weights, for every file that multiplies panels; needs AVX-512 F, BW, VL, DQ. */
#include <immintrin.h>

#include "panel_lines.h"

#define SMALLEST 1e-30f /* as in activations.c */
#define FULL_RATIO 32767.0f

ALWAYS_INLINE void pack_bf16_row(const void *x, int dtype, int64_t start, int64_t columns, uint8_t *out) {
    for (; columns > 0; start += 32, columns -= 32, out += STEP_TILE) {
        int count = columns < 32 ? (int)columns : 32;
        uint16_t values[32] = {0};
        float wide[32];
        if (dtype == BF16) {
            memcpy(values, (const uint16_t *)x + start, (size_t)count * 2);
        } else {
            load_values(x, dtype, start, count, wide);
            store_values(wide, BF16, 0, count, values);
        }
        memcpy(out, values, STEP_BYTES);
    }
}

__attribute__((unused)) static void pack_bf16(const struct many *many, const void *x, int dtype, int64_t stride,
                                              int64_t rows, int64_t columns, float unit, const struct packed *packed,
                                              int64_t tile) {
    uint8_t *out = packed->tiles + tile * packed->steps * STEP_TILE;
    (void)many, (void)unit;
    for (int64_t row = 0; row < TILE; row++) {
        if (row < rows)
            pack_bf16_row(x, dtype, row * stride, columns, out + row * STEP_BYTES);
        else
            for (int64_t step = 0; step < packed->steps; step++)
                memset(out + step * STEP_TILE + row * STEP_BYTES, 0, STEP_BYTES);
    }
}

/* One row's span of columns: the arithmetic of quantize_row. count values; codes of a step lie STEP_TILE apart. */
ALWAYS_INLINE void round_span(const float *values, int64_t count, float unit, uint8_t *codes, float *scale,
                              int32_t *offset) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i most = _mm512_setzero_si512(), sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += 16)
        most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_loadu_si512(values + i), magnitude));
    uint32_t largest = _mm512_reduce_max_epu32(most);
    float inverse = 0.0f;
    *scale = largest >= 0x7f800000 ? float_of(0x7fc00000) : 0.0f;
    int used = largest < 0x7f800000 && float_of(largest) >= SMALLEST;
    if (used) {
        inverse = 127.0f / float_of(largest);
        *scale = float_of(largest) * unit;
    }
    for (int64_t i = 0; i < count; i += 16) {
        __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(values + i), _mm512_set1_ps(inverse));
        __m512i code = used ? _mm512_cvtps_epi32(scaled) : _mm512_setzero_si512();
        sum = _mm512_add_epi32(sum, code);
        _mm_storeu_si128((__m128i *)(codes + i / GROUP * STEP_TILE + i % GROUP), _mm512_cvtepi32_epi8(code));
    }
    *offset = -128 * _mm512_reduce_add_epi32(sum);
}

__attribute__((unused)) static void pack_int8(const struct many *many, const void *x, int dtype, int64_t stride,
                                              int64_t rows, int64_t columns, float unit, const struct packed *packed,
                                              int64_t tile) {
    int64_t width = (int64_t)many->span * GROUP;
    for (int64_t row = 0; row < TILE; row++)
        for (int64_t span = 0; span < packed->spans; span++) {
            float values[SLAB];
            int64_t start = span * width, left = columns - start, count = left < width ? left : width;
            int64_t whole = parts(count, GROUP) * GROUP, at = (tile * packed->spans + span) * TILE + row;
            if (row < rows) load_values(x, dtype, row * stride + start, (int)count, values);
            if (row >= rows) count = 0;
            memset(values + count, 0, (size_t)(whole - count) * sizeof(float));
            uint8_t *codes = packed->tiles + (tile * packed->steps + start / GROUP) * STEP_TILE + row * STEP_BYTES;
            round_span(values, whole, unit, codes, packed->scales + at, packed->offsets + at);
        }
}

#ifdef __AVX512BF16__
/* Two columns of 16 outputs, fp32 -> a line of pairs. */
ALWAYS_INLINE __m512i line_of_pairs(__m512 even, __m512 odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

/* A line of codes to four lines. */
ALWAYS_INLINE void nf4_line_to_bf16(const uint8_t *codes, __m512 table, __m512 scale, uint8_t *out) {
    __m512i all = _mm512_loadu_si512(codes);
#define COLUMN(shift) _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(all, shift), table), scale)
    _mm512_storeu_si512(out, line_of_pairs(COLUMN(0), COLUMN(8)));
    _mm512_storeu_si512(out + LINE, line_of_pairs(COLUMN(16), COLUMN(24)));
    _mm512_storeu_si512(out + 2 * LINE, line_of_pairs(COLUMN(4), COLUMN(12)));
    _mm512_storeu_si512(out + 3 * LINE, line_of_pairs(COLUMN(20), COLUMN(28)));
#undef COLUMN
}

ALWAYS_INLINE void nf4_to_bf16(const uint8_t *codes, int64_t count, uint8_t *out) {
    const __m512 table = _mm512_loadu_ps(nf4_table);
    for (int64_t group = 0; group < count / GROUP; group++, codes += GROUP_LINES * LINE) {
        __m512 scale = _mm512_loadu_ps(codes + 8 * LINE);
        for (int line = 0; line < 8; line++, out += 4 * LINE) nf4_line_to_bf16(codes + line * LINE, table, scale, out);
    }
}

ALWAYS_INLINE void int8_to_bf16(const uint8_t *codes, const float *scales, int64_t count, uint8_t *out) {
    const __m512 scale = _mm512_loadu_ps(scales);
    for (int64_t line = 0; line < count / 4; line++, codes += LINE, out += 2 * LINE) {
        __m512i all = _mm512_loadu_si512(codes);
#define COLUMN(shift) \
    _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(all, 24 - (shift)), 24)), scale)
        _mm512_storeu_si512(out, line_of_pairs(COLUMN(0), COLUMN(8)));
        _mm512_storeu_si512(out + LINE, line_of_pairs(COLUMN(16), COLUMN(24)));
#undef COLUMN
    }
}

static void expand_bf16(const struct many *many, const struct expansion *expansion) {
    (void)many;
    expand_values(expansion, 2, nf4_to_bf16, int8_to_bf16);
}
#endif

/* Codes of a span with the factors that the widest scale of the span leaves to each group, in 1 / 32768. */
ALWAYS_INLINE __m512i rescaled(__m512i codes, __m512i ratios) {
    const __m512i half = _mm512_set1_epi16(128), upper = _mm512_set1_epi16((short)0xff00);
    __m512i even = _mm512_add_epi16(_mm512_mulhrs_epi16(_mm512_slli_epi16(codes, 8), ratios), half);
    __m512i odd = _mm512_add_epi16(_mm512_mulhrs_epi16(_mm512_and_si512(codes, upper), ratios), half);
    return _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaaull, _mm512_srli_epi16(even, 8), odd);
}

/* A span of a tile: eight lines a group. scale: of the span, 16. */
ALWAYS_INLINE void nf4_to_int8(const uint8_t *codes, int64_t groups, __m512i shift, uint8_t *out, float *scale) {
    const __m512i low_half = _mm512_set1_epi8(15);
    const __m512i book = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)nf4_codes));
    const uint8_t *scales = codes + 8 * LINE;
    __m512 most = _mm512_loadu_ps(scales);
    for (int64_t group = 1; group < groups; group++)
        most = _mm512_max_ps(most, _mm512_loadu_ps(scales + group * GROUP_LINES * LINE));
    _mm512_storeu_ps(scale, most);
    __mmask16 some = _mm512_cmp_ps_mask(most, _mm512_setzero_ps(), _CMP_GT_OQ);
    for (int64_t group = 0; group < groups; group++, codes += LINE) {
        __m512 part = _mm512_maskz_div_ps(some, _mm512_loadu_ps(codes + 8 * LINE), most);
        __m512i ratios = _mm512_cvtps_epi32(_mm512_mul_ps(part, _mm512_set1_ps(FULL_RATIO)));
        ratios = _mm512_or_si512(ratios, _mm512_slli_epi32(ratios, 16));
        for (int line = 0; line < 8; line++, codes += LINE, out += 2 * LINE) {
            __m512i both = _mm512_loadu_si512(codes);
            __m512i low = _mm512_shuffle_epi8(book, _mm512_and_si512(both, low_half));
            __m512i high = _mm512_shuffle_epi8(book, _mm512_and_si512(_mm512_srli_epi16(both, 4), low_half));
            if (groups > 1) low = rescaled(low, ratios), high = rescaled(high, ratios);
            _mm512_storeu_si512(out, _mm512_xor_si512(low, shift));
            _mm512_storeu_si512(out + LINE, _mm512_xor_si512(high, shift));
        }
    }
}

/* biased: codes are shifted by 128, for instructions that take unsigned weights. */
ALWAYS_INLINE void expand_int8_panel(const struct many *many, const struct expansion *expansion, int biased) {
    const struct weight *weight = expansion->weight;
    const struct slab *slab = &expansion->slab;
    int64_t count = expansion->count;
    const __m512i shift = _mm512_set1_epi8((char)(biased ? 128 : 0));
    int64_t groups = parts(count, GROUP), spans = parts(groups, many->span);
    struct lines lines;
    for (int64_t t = 0; t < PANEL_TILES; t++) {
        uint8_t *out = slab->lines + t * TILE_LINES;
        int64_t tile = expansion->panel * PANEL_TILES + t, used = tile * TILE < weight->rows ? count : 0;
        if (used) find_lines(weight, tile, expansion->first, count, &lines);
        for (int64_t span = 0; span < spans; span++) {
            float *scale = slab->scales + span * PANEL + t * TILE;
            int64_t start = span * many->span, end = start + many->span < groups ? start + many->span : groups;
            for (int lane = 0; lane < TILE; lane++) scale[lane] = 1.0f;
            if (used && weight->format == NF4)
                nf4_to_int8(lines.codes + start * GROUP_LINES * LINE, end - start, shift, out + start * 16 * LINE, scale);
        }
        for (int64_t line = 0; used && weight->format == INT8 && line < count / 4; line++)
            _mm512_storeu_si512(out + line * LINE, _mm512_xor_si512(_mm512_loadu_si512(lines.codes + line * LINE), shift));
        clear_lines(out, used / 4, slab->steps * 16);
    }
}
