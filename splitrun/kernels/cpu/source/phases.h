/* Phases of tasks: each member has a run of its own in every phase, takes from the others' runs when it is done, and goes on
 * when all tasks of the phase are. Any number of threads, late ones too, gives the same result. */
#ifndef SPLITRUN_PHASES_H
#define SPLITRUN_PHASES_H

#include <sched.h>

#include "shares.h"

#define SPINS 4000 /* looks at a counter before the processor is offered to others */

struct phase {
    struct shares shares;
    _Alignas(64) atomic_llong done;
};

/* A thread's place in a team: which member, and which memory is its own. */
struct seat {
    int member, bench;
};

ALWAYS_INLINE struct seat take_seat(atomic_int *arrived, int threads) {
    int number = thread_number();
    if (number < 0) number = atomic_fetch_add_explicit(arrived, 1, memory_order_relaxed);
    struct seat seat = {number % members_of(threads), number % (threads < 1 ? 1 : threads)};
    return seat;
}

/* runs has room for as many as there are members. */
ALWAYS_INLINE void open_phase(struct phase *phase, int64_t tasks, int members, struct run_of_tasks *runs) {
    phase->shares = share(tasks, members, runs);
    atomic_init(&phase->done, 0);
}

ALWAYS_INLINE void wait_for(const struct phase *phase) {
    for (int spins = 0; atomic_load_explicit(&phase->done, memory_order_acquire) < phase->shares.total; spins++) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
        if (spins >= SPINS) sched_yield();
    }
}

/* The next task of a phase for a member, -1 when none is left. */
ALWAYS_INLINE int64_t next_task(const struct phase *phase, int member) { return take(&phase->shares, member); }

ALWAYS_INLINE void task_done(struct phase *phase) { atomic_fetch_add_explicit(&phase->done, 1, memory_order_release); }

#endif
