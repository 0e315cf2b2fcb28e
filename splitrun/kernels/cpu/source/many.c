/* Which products of many rows this build has and this processor runs, best first. */
#if defined(__linux__)
#define _GNU_SOURCE /* syscall */
#endif
#include "panels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define ASK_FOR_STATE 0x1023 /* arch_prctl: ARCH_REQ_XCOMP_PERM */
#define TILE_DATA 18
#endif

#define EDX_AMX_BF16 (1u << 22)
#define EDX_AMX_TILE (1u << 24)
#define EDX_AMX_INT8 (1u << 25)

/* Whether the processor has these tile instructions and the system lets this process use them; it must be asked. */
static int tiles_allowed(unsigned wanted) {
    unsigned a, b, c, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & wanted) != wanted) return 0;
#if defined(__linux__)
    return syscall(SYS_arch_prctl, ASK_FOR_STATE, TILE_DATA) == 0;
#else
    return 0;
#endif
}

static int has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

/* The index-th that runs here, or null after the last. */
EXPORT const struct many *splitrun_many(int32_t index) {
    const struct many *found[12];
    int count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (has_avx512()) {
        int bf16_tiles = tiles_allowed(EDX_AMX_TILE | EDX_AMX_BF16), int8_tiles = tiles_allowed(EDX_AMX_TILE | EDX_AMX_INT8);
#ifdef HAVE_AMX
        if (bf16_tiles) found[count++] = &many_amx_bf16;
        if (bf16_tiles && int8_tiles) found[count++] = &many_amx_int8;
#endif
        (void)bf16_tiles, (void)int8_tiles;
#ifdef HAVE_AVX512INT16
        if (__builtin_cpu_supports("avx512vnni")) found[count++] = &many_avx512int16;
#endif
#ifdef HAVE_AVX512BF16
        if (__builtin_cpu_supports("avx512bf16")) found[count++] = &many_avx512bf16;
#endif
#ifdef HAVE_AVX512INT8
        if (__builtin_cpu_supports("avx512vnni")) found[count++] = &many_avx512int8;
        if (__builtin_cpu_supports("avx512vnni")) found[count++] = &many_avx512int8_wide;
#endif
    }
    if (__builtin_cpu_supports("avx2")) {
#ifdef HAVE_AVX2VNNIINT16
        if (__builtin_cpu_supports("avxvnni")) found[count++] = &many_avx2vnniint16;
#endif
#ifdef HAVE_AVX2INT16
        found[count++] = &many_avx2int16;
#endif
#ifdef HAVE_AVX2FP32
        if (__builtin_cpu_supports("fma")) found[count++] = &many_avx2fp32;
#endif
    }
#endif
    return index >= 0 && index < count ? found[index] : 0;
}

EXPORT const char *splitrun_many_name(const struct many *many) { return many->name; }

EXPORT int32_t splitrun_many_kind(const struct many *many) { return many->kind; }

EXPORT int32_t splitrun_many_span(const struct many *many) { return many->span; }

int has_tiles(void) {
#if defined(__x86_64__)
    return tiles_allowed(EDX_AMX_TILE | EDX_AMX_BF16);
#else
    return 0;
#endif
}

/* Whether the processor has tile instructions, whatever this build knows of them: torch uses them then. */
EXPORT int32_t splitrun_has_tiles(void) { return has_tiles(); }
