/* Decoder layers one after the other in one call. Each phase of each layer is a set of tasks: whoever is free takes one,
 * and goes on when all tasks of the phase are done, so any number of threads, late ones too, gives the same result. */
#include <sched.h>

#include "chain.h"
#include "shares.h"

#define SPINS 4000        /* looks at a counter before the processor is offered to others */
#define PREFETCHED 16384  /* bytes of the next weights that are on their way while a phase ends */

/* Tasks of a phase, and of all up to it. */
struct phase {
    int64_t tasks, until;
};

/* What the members write lies on lines of their own: what one writes, others need not fetch. */
struct chain {
    struct run run;
    struct phase *phases; /* of all layers */
    int members;
    atomic_int arrived;
    struct run_of_tasks *runs;   /* of each member: the number of the phase, from 1 on, and behind 32 bits its next task */
    _Alignas(64) atomic_llong done; /* tasks of all phases */
    _Alignas(64) atomic_int passed; /* phases of which all tasks are done */
};

/* The next task of a phase for a member, of its own run or of another's; -1 when nothing is left. A run that nobody has
 * begun in this phase still shows an earlier one: no member resets it, so that a member may come late, or never. */
static int64_t take_of(const struct chain *chain, int index, int member) {
    int64_t tasks = chain->phases[index].tasks, number = index + 1;
    int runs = tasks < chain->members ? (int)tasks : chain->members;
    for (int i = 0, other = member % runs; i < runs; i++, other = other + 1 < runs ? other + 1 : 0) {
        int64_t end = tasks * (other + 1) / runs;
        long long seen = atomic_load_explicit(&chain->runs[other].next, memory_order_relaxed);
        while (seen >> 32 <= number) {
            int64_t next = seen >> 32 == number ? (int64_t)(seen & 0xffffffff) : tasks * other / runs;
            if (next >= end) break;
            if (atomic_compare_exchange_weak_explicit(&chain->runs[other].next, &seen, number << 32 | (next + 1),
                                                      memory_order_relaxed, memory_order_relaxed))
                return next;
        }
    }
    return -1;
}

/* Count what a member did of a phase, and wait until all of it is done. */
static void pass(struct chain *chain, int index, int64_t count) {
    if (count && atomic_fetch_add_explicit(&chain->done, count, memory_order_acq_rel) + count == chain->phases[index].until)
        atomic_store_explicit(&chain->passed, index + 1, memory_order_release);
    for (int spins = 0; atomic_load_explicit(&chain->passed, memory_order_acquire) <= index; spins++) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
        if (spins >= SPINS) sched_yield();
    }
}

/* Let the weights come that the member will read first in the next product. */
static void look_ahead(const struct chain *chain, int index, int member) {
    const uint8_t *weights = task_weights(chain->run.blocks[index / PHASES], index % PHASES,
                                          chain->phases[index].tasks * member / chain->members);
    for (int byte = 0; weights && byte < PREFETCHED; byte += LINE) __builtin_prefetch(weights + byte, 0, 2);
}

static void work(void *argument) {
    static const int following[PHASES] = {[PROJECT] = OUTPUT, [OUTPUT] = GATE, [GATE] = DOWN, [DOWN] = PHASES + PROJECT};
    struct chain *chain = argument;
    int member = join_team(&chain->arrived, chain->members), phases = chain->run.layers * PHASES;
    for (int index = 0; index < phases; index++) {
        int next = following[index % PHASES] ? index - index % PHASES + following[index % PHASES] : phases;
        int64_t count = 0;
        for (int64_t task; (task = take_of(chain, index, member)) >= 0; count++)
            perform(&chain->run, index / PHASES, index % PHASES, task);
        if (next < phases) look_ahead(chain, next, member);
        pass(chain, index, count);
    }
}

/* Parts of scratch memory, each at a multiple of 64 bytes. */
static void *part(uintptr_t *memory, int64_t bytes) {
    uintptr_t start = *memory;
    *memory += (uintptr_t)(bytes + 63) / 64 * 64;
    return (void *)start;
}

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* Lay out a chain's memory from an address on; returns how much it is. Null: only that. */
static int64_t lay_out(struct chain *chain, void *scratch) {
    struct run *run = &chain->run;
    int64_t hidden = 0, projected = 0, context = 0, gated = 0, partial = 0, angles = 0, tokens = run->tokens;
    uintptr_t memory = (uintptr_t)scratch;
    for (int layer = 0; layer < run->layers; layer++) {
        const struct block *block = run->blocks[layer];
        hidden = most(hidden, block->query.columns);
        projected = most(projected, projected_width(block));
        context = most(context, block->query.rows);
        gated = most(gated, block->gate.rows);
        partial = most(partial, partial_values(block, run->rows[layer]));
        angles = most(angles, block->rotary);
    }
    chain->phases = part(&memory, (int64_t)sizeof(struct phase) * run->layers * PHASES);
    chain->runs = part(&memory, (int64_t)sizeof(struct run_of_tasks) * chain->members);
    run->cosine_values = part(&memory, tokens * angles * 4);
    run->sine_values = part(&memory, tokens * angles * 4);
    run->hidden = part(&memory, tokens * hidden * 4);
    run->normed = part(&memory, tokens * hidden * 4);
    run->projected = part(&memory, tokens * projected * 4);
    run->context = part(&memory, tokens * context * 4);
    run->partial = part(&memory, partial * 4);
    run->narrow = activations_in(part(&memory, tokens * activation_bytes(most(hidden, context))), tokens,
                                 most(hidden, context));
    run->wide = activations_in(part(&memory, tokens * activation_bytes(gated)), tokens, gated);
    for (int member = 0; scratch && member < chain->members; member++) atomic_init(&chain->runs[member].next, 0);
    for (int64_t index = 0, until = 0; scratch && index < run->layers * PHASES; index++) {
        int64_t tasks = phase_tasks(run, (int)(index / PHASES), index % PHASES);
        chain->phases[index] = (struct phase){tasks, until += tasks};
    }
    return (int64_t)(memory - (uintptr_t)scratch);
}

/* Bytes of scratch memory, at an address that 64 divides, that splitrun_layers wants. */
EXPORT int64_t splitrun_layers_scratch_bytes(const struct block *const *blocks, const struct rows *const *rows,
                                             int32_t layers, int32_t threads) {
    struct chain chain = {.run = {.blocks = blocks, .rows = rows, .layers = layers}, .members = members_of(threads)};
    chain.run.tokens = (int)(rows[0]->rows * rows[0]->count);
    return lay_out(&chain, 0);
}

/* Run layers of one hidden width and dtype. Shape of in and out: (rows * count, hidden); of cosines and sines: (rows *
 * count, rotary); all of the dtype. rows has an entry per layer, all for the same tokens. The new keys and values are
 * written to the blocks. */
EXPORT void splitrun_layers(const struct level *level, const struct block *const *blocks, const struct rows *const *rows,
                            int32_t layers, const void *in, const void *cosines, const void *sines, void *out,
                            void *scratch, int32_t threads) {
    struct chain chain = {.run = {level, blocks, rows, in, cosines, sines, (int)(rows[0]->rows * rows[0]->count), layers},
                          .members = members_of(threads)};
    lay_out(&chain, scratch);
    run_team(threads, work, &chain);
    store_values(chain.run.hidden, blocks[0]->dtype, 0, (int)(chain.run.tokens * blocks[0]->query.columns), out);
}
