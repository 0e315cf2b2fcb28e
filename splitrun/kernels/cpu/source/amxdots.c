/* x86 with AMX: as avx512dots, but for attention to bf16 and int8 keys and values, which runs on tiles. */
#define OWN_ATTEND
#include "avx512_body.h"
#include "attend_tiles.h"

LEVEL(amxdots);
