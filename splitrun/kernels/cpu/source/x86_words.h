/* What all x86 levels share: words of lines in one register, and prefetching. Needs SSE 4.1. */
#ifndef SPLITRUN_X86_WORDS_H
#define SPLITRUN_X86_WORDS_H

#include <immintrin.h>
#include <string.h>

#include "kernels.h"

ALWAYS_INLINE int32_t word_at(const void *bytes) {
    int32_t word;
    memcpy(&word, bytes, 4);
    return word;
}

/* Four bytes of each of four lines, without a way through memory. */
ALWAYS_INLINE __m128i four_lines(const uint8_t *codes, int64_t stride) {
    __m128i words = _mm_cvtsi32_si128(word_at(codes));
    words = _mm_insert_epi32(words, word_at(codes + stride), 1);
    words = _mm_insert_epi32(words, word_at(codes + 2 * stride), 2);
    return _mm_insert_epi32(words, word_at(codes + 3 * stride), 3);
}

/* Let come what is read next to the first cache, and what follows it to the second. */
ALWAYS_INLINE void fetch_both(const uint8_t *line) {
    _mm_prefetch((const char *)line + NEXT_AHEAD, _MM_HINT_T0);
    _mm_prefetch((const char *)line + FAR_AHEAD, _MM_HINT_T1);
}

#endif
