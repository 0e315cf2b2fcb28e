/* What a prompt needs beside products, where those are in bf16; needs AVX-512 BF16. */
#include <immintrin.h>

#include "lanes.h"

/* As `exponentials`, with fused multiply-adds: error below 2e-7 too. */
ALWAYS_INLINE lanes rapid_exponentials(lanes values) {
    __m512 x = _mm512_max_ps(_mm512_set1_ps(-87.0f), (__m512)values); /* the second where that is NaN */
    x = _mm512_min_ps(_mm512_set1_ps(88.0f), x);
    __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), x); /* ln 2 in two parts */
    rest = _mm512_fmadd_ps(whole, _mm512_set1_ps(2.12194440e-4f), rest);
    __m512 sum = _mm512_set1_ps(1.9875691500e-4f); /* coefficients as in Cephes' expf */
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.3981999507e-3f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(8.3334519073e-3f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(4.1665795894e-2f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.6666665459e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(5.0000001201e-1f));
    sum = _mm512_fmadd_ps(sum, _mm512_mul_ps(rest, rest), _mm512_add_ps(rest, _mm512_set1_ps(1.0f)));
    return (lanes)_mm512_scalef_ps(sum, whole);
}

#include "chunk_rows.h"

/* As gate_panel, to packed bf16: rows and outputs that do not exist are zeros there as in the sums. */
static void gate_packed(const float *gates, const float *ups, int64_t rows, int64_t count, const struct packed *packed,
                        int64_t first_row, int64_t panel) {
    for (int64_t row = 0; row < parts(rows, TILE) * TILE; row++, gates += PANEL, ups += PANEL) {
        int64_t at = first_row + row, step = panel * (PANEL / 32);
        uint8_t *target = packed->tiles + (at / TILE * packed->steps + step) * STEP_TILE + at % TILE * STEP_BYTES;
        float values[PANEL];
        uint16_t rounded[PANEL];
        for (int i = 0; i < PANEL; i += LANES)
            store_lanes(values + i, gated(load_lanes(gates + i), load_lanes(ups + i)));
        store_values(values, BF16, 0, PANEL, rounded);
        memcpy(target, rounded, STEP_BYTES);
        if (count > 32) memcpy(target + STEP_TILE, rounded + 32, STEP_BYTES);
    }
}

/* Which of 16 of 64 keys are seen: those from first to last. */
ALWAYS_INLINE __mmask16 seen(int part, int first, int last) {
    uint64_t below = last < KEYS ? (1ull << last) - 1 : ~0ull;
    return first < last ? (__mmask16)((below & ~0ull << first) >> (part * LANES)) : (__mmask16)0;
}

/* A row's scores of 64 keys, of which first to last are seen, to weights in bf16, a step's lines apart; updates the largest
 * and the sum so far and returns what earlier results shrink by. */
static float weigh(const float *scores, int first, int last, float *largest, float *total, uint8_t *weights) {
    const __m512 nothing = _mm512_set1_ps(-__builtin_inff());
    float before = *largest;
    __m512 of[KEYS / LANES], sums = _mm512_setzero_ps(), most = nothing;
#pragma GCC unroll 4
    for (int i = 0; i < KEYS / LANES; i++) {
        of[i] = _mm512_mask_loadu_ps(nothing, seen(i, first, last), scores + i * LANES);
        most = _mm512_max_ps(of[i], most); /* the second where the first is NaN */
    }
    float now = _mm512_reduce_max_ps(most);
    now = now > before ? now : before;
#pragma GCC unroll 4
    for (int i = 0; i < KEYS / LANES; i++) {
        lanes weighed = rapid_exponentials((lanes)of[i] - now);
        of[i] = _mm512_maskz_mov_ps(seen(i, first, last), (__m512)weighed);
        sums = _mm512_add_ps(sums, of[i]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < KEYS / LANES; i += 2)
        _mm512_storeu_si512(weights + i / 2 * STEP_TILE, (__m512i)_mm512_cvtne2ps_pbh(of[i + 1], of[i]));
    float shrink = shrinking(before, now);
    *largest = now;
    *total = *total * shrink + _mm512_reduce_add_ps(sums);
    return shrink;
}

/* Keys of a block as lines of a panel; pair p of key i in line p of its tile. */
static void lay_keys(const uint16_t *const *keys, int count, int width, uint8_t *lines) {
    for (int i = 0; i < KEYS; i++)
        for (int pair = 0; pair < (width + 31) / 32 * 16; pair++) {
            uint32_t two = 0;
            if (i < count && pair * 2 < width) memcpy(&two, keys[i] + pair * 2, 4);
            memcpy(lines + i / TILE * TILE_LINES + pair * LINE + i % TILE * 4, &two, 4);
        }
}

/* 64 columns of values as lines of a panel: keys in pairs. */
static void lay_values(const uint16_t *const *values, int count, int columns, uint8_t *lines) {
    for (int pair = 0; pair < KEYS / 2; pair++) {
        uint32_t out[PANEL] = {0};
        const uint16_t *even = 2 * pair < count ? values[2 * pair] : 0, *odd = 2 * pair + 1 < count ? values[2 * pair + 1] : 0;
        for (int i = 0; even && i < columns; i++) out[i] = even[i];
        for (int i = 0; odd && i < columns; i++) out[i] |= (uint32_t)odd[i] << 16;
        for (int tile = 0; tile < PANEL_TILES; tile++)
            memcpy(lines + tile * TILE_LINES + pair * LINE, out + tile * TILE, LINE);
    }
}

static const struct chunk_rows chunk_rows = {norm_row, turn_head,   add_panel, gate_panel,   gate_packed,   weigh,
                                             lay_keys, lay_values, scale_row, widen_values, narrow_values};
