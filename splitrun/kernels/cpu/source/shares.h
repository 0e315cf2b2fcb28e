/* Work handed out in tasks: each member of a team has a run of its own, side by side in memory, and takes from the others'
 * runs when it is done, so that a thread that another process holds up leaves its work to the rest. Which thread does
 * what changes no bit. */
#ifndef SPLITRUN_SHARES_H
#define SPLITRUN_SHARES_H

#include <stdatomic.h>

#include "kernels.h"

#define MOST_MEMBERS 64   /* further threads share a run with one of these */
#define ALONE_BYTES 32768 /* below this a second thread costs more than it saves */

struct run_of_tasks {
    _Alignas(64) atomic_llong next;
};

struct shares {
    int64_t total;
    int members;
    struct run_of_tasks *runs;
};

/* A team's members as they come. */
struct team {
    atomic_int arrived;
    int members;
    struct run_of_tasks runs[MOST_MEMBERS];
};

ALWAYS_INLINE int members_of(int threads) { return threads < 1 ? 1 : threads < MOST_MEMBERS ? threads : MOST_MEMBERS; }

/* Which member the calling thread is: in every call the same, so that it finds in its caches, and in memory near to it,
 * what it left there. Where the runtime does not say, members are numbered as they come. */
ALWAYS_INLINE int join_team(atomic_int *arrived, int members) {
    int number = thread_number();
    return (number < 0 ? atomic_fetch_add_explicit(arrived, 1, memory_order_relaxed) : number) % members;
}

/* Divide tasks among members; runs has room for as many. */
ALWAYS_INLINE struct shares share(int64_t tasks, int members, struct run_of_tasks *runs) {
    struct shares shares = {tasks, members, runs};
    for (int member = 0; member < members; member++) atomic_init(&runs[member].next, tasks * member / members);
    return shares;
}

/* The next task for a member, -1 when nothing is left. */
ALWAYS_INLINE int64_t take(const struct shares *shares, int member) {
    for (int i = 0, other = member; i < shares->members; i++, other = other + 1 < shares->members ? other + 1 : 0) {
        atomic_llong *next = &shares->runs[other].next;
        int64_t end = shares->total * (other + 1) / shares->members;
        if (atomic_load_explicit(next, memory_order_relaxed) >= end) continue;
        int64_t task = (int64_t)atomic_fetch_add_explicit(next, 1, memory_order_relaxed);
        if (task < end) return task;
    }
    return -1;
}

#endif
