/* Runs work on the threads of the OpenMP runtime that the process already has. This library links none of its own: two
 * runtimes in one process spin against each other. Without one, the caller's thread does everything. */
#include "kernels.h"

typedef void parallel_region(void (*work)(void *), void *argument, unsigned threads, unsigned flags);

typedef int number_in_team(void);

static parallel_region *region;
static number_in_team *number;

/* The addresses of GOMP_parallel and omp_get_thread_num in the loaded runtime (libgomp, or libomp and libiomp5 that offer
 * the same), or null. */
EXPORT void splitrun_use_openmp(void *gomp_parallel, void *omp_get_thread_num) {
    region = (parallel_region *)gomp_parallel;
    number = (number_in_team *)omp_get_thread_num;
}

/* The calling thread's number in its team, -1 where that is not known. */
int thread_number(void) { return number ? number() : -1; }

/* Run work on up to this many threads at once, the caller's among them, and wait. It may be granted fewer: work takes
 * its parts from a counter and never waits for a team mate. */
void run_team(int threads, void (*work)(void *), void *argument) {
    if (threads > 1 && region)
        region(work, argument, (unsigned)threads, 0);
    else
        work(argument);
}
