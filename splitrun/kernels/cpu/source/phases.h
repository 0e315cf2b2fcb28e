/* Phases of tasks: whoever is free takes the next task of a phase, and goes on when all of them are done. Any number of
 * threads, late ones too, gives the same result. */
#ifndef SPLITRUN_PHASES_H
#define SPLITRUN_PHASES_H

#include <sched.h>
#include <stdatomic.h>

#include "kernels.h"

#define SPINS 4000 /* looks at a counter before the processor is offered to others */

struct phase {
    _Alignas(64) atomic_llong next;
    _Alignas(64) atomic_llong done;
    int64_t tasks;
};

ALWAYS_INLINE void wait_for(const struct phase *phase) {
    for (int spins = 0; atomic_load_explicit(&phase->done, memory_order_acquire) < phase->tasks; spins++) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
        if (spins >= SPINS) sched_yield();
    }
}

/* The next task of a phase, -1 when none is left. */
ALWAYS_INLINE int64_t next_task(struct phase *phase) {
    int64_t task = (int64_t)atomic_fetch_add_explicit(&phase->next, 1, memory_order_relaxed);
    return task < phase->tasks ? task : -1;
}

ALWAYS_INLINE void task_done(struct phase *phase) { atomic_fetch_add_explicit(&phase->done, 1, memory_order_release); }

#endif
