/* Which levels this build has and this processor runs, best first. The build defines HAVE_... for each file that its
 * compiler could compile. */
#include "panels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1 << 20)
#endif
#endif

const float nf4_table[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

const int8_t nf4_codes[16] = {-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127};

const int16_t nf4_wide_codes[16] = {-1722, -1199, -904, -680, -490, -318, -157, 0,
                                    137,   277,   424,  582,  759,  969,  1245, 1722};

/* The index-th level that runs here, or null after the last; portable is always the last. */
EXPORT const struct level *splitrun_level(int32_t index) {
    const struct level *found[8];
    int count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                 __builtin_cpu_supports("avx512vnni");
    (void)avx512;
#ifdef HAVE_AMXDOTS
    if (avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16") && has_tiles())
        found[count++] = &level_amxdots;
#endif
#ifdef HAVE_AVX512DOTS
    if (avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16"))
        found[count++] = &level_avx512dots;
#endif
#ifdef HAVE_AVX512VNNI
    if (avx512) found[count++] = &level_avx512vnni;
#endif
#ifdef HAVE_AVX2VNNI
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("avxvnni")) found[count++] = &level_avx2vnni;
#endif
#ifdef HAVE_AVX2
    if (__builtin_cpu_supports("avx2")) found[count++] = &level_avx2;
#endif
#endif
#if defined(__aarch64__) && defined(HAVE_NEON)
#if defined(__linux__)
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) found[count++] = &level_neon;
#elif defined(__APPLE__)
    found[count++] = &level_neon; /* every Mac with an Arm processor has the dot product */
#endif
#endif
    found[count++] = &level_portable;
    return index >= 0 && index < count ? found[index] : 0;
}

EXPORT const char *splitrun_level_name(const struct level *level) { return level->name; }

/* Whether products with bf16 matrices take activations rounded to bf16, in sums of another order. */
EXPORT int32_t splitrun_level_dots(const struct level *level) { return level->dots; }
