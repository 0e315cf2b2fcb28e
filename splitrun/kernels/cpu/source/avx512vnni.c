/* x86 with AVX-512 and VNNI. */
#include "avx512_body.h"

LEVEL(avx512vnni);
