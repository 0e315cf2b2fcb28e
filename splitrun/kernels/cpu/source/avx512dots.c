/* x86 with AVX-512, VNNI, VBMI and BF16: as avx512vnni, but for bf16 matrices, keys and values by dot products of bf16. */
#include "avx512_body.h"

LEVEL(avx512dots);
