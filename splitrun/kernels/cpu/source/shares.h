/* Work handed out in runs of tiles from a counter, so that a thread that another process holds up leaves its work to the
 * others. Which thread does what changes no bit. */
#ifndef SPLITRUN_SHARES_H
#define SPLITRUN_SHARES_H

#include <stdatomic.h>

#include "kernels.h"

#define RUN_BYTES 65536   /* about what a thread takes at a time */
#define ALONE_BYTES 32768 /* below this a second thread costs more than it saves */

struct shares {
    atomic_llong next;
    int64_t total, each;
};

ALWAYS_INLINE struct shares share(int64_t tiles, int64_t tile_bytes, int threads) {
    int64_t each = RUN_BYTES / (tile_bytes + 1) + 1, most = tiles / ((int64_t)threads * 2) + 1;
    struct shares shares = {0, tiles, each < most ? each : most};
    return shares;
}

/* The next run of tiles, [*start, *stop); 0 when nothing is left. */
ALWAYS_INLINE int take(struct shares *shares, int64_t *start, int64_t *stop) {
    *start = (int64_t)atomic_fetch_add_explicit(&shares->next, shares->each, memory_order_relaxed);
    *stop = *start + shares->each < shares->total ? *start + shares->each : shares->total;
    return *start < shares->total;
}

#endif
