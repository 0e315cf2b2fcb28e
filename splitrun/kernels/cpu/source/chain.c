/* Decoder layers one after the other in one call. Each phase of each layer is a set of tasks: whoever is free takes one,
 * and goes on when all tasks of the phase are done, so any number of threads, late ones too, gives the same result. */
#include <sched.h>

#include "chain.h"
#include "shares.h"

#define SPINS 4000        /* looks at a counter before the processor is offered to others */
#define PREFETCHED 16384  /* bytes of the next weights that are on their way while a phase ends */

struct phase {
    _Alignas(64) atomic_llong done;
    struct shares shares;
};

struct chain {
    struct run run;
    struct phase *phases; /* of all layers */
    int members;
    atomic_int arrived;
};

static void wait_for(const struct phase *phase) {
    for (int spins = 0; atomic_load_explicit(&phase->done, memory_order_acquire) < phase->shares.total; spins++) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
        if (spins >= SPINS) sched_yield();
    }
}

/* Let the weights come that the member will read first in the next product. */
static void look_ahead(const struct chain *chain, int index, int member) {
    const struct shares *shares = &chain->phases[index].shares;
    const uint8_t *weights = task_weights(chain->run.blocks[index / PHASES], index % PHASES,
                                          shares->total * member / shares->members);
    for (int byte = 0; weights && byte < PREFETCHED; byte += LINE) __builtin_prefetch(weights + byte, 0, 2);
}

static void work(void *argument) {
    static const int following[PHASES] = {[PROJECT] = OUTPUT, [OUTPUT] = GATE, [GATE] = DOWN, [DOWN] = PHASES + PROJECT};
    struct chain *chain = argument;
    int member = join_team(&chain->arrived, chain->members), phases = chain->run.layers * PHASES;
    for (int index = 0; index < phases; index++) {
        struct phase *phase = &chain->phases[index];
        int next = following[index % PHASES] ? index - index % PHASES + following[index % PHASES] : phases;
        for (int64_t task; (task = take(&phase->shares, member)) >= 0;) {
            perform(&chain->run, index / PHASES, index % PHASES, task);
            atomic_fetch_add_explicit(&phase->done, 1, memory_order_release);
        }
        if (next < phases) look_ahead(chain, next, member);
        wait_for(phase);
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
    struct run_of_tasks *runs = part(&memory, (int64_t)sizeof(struct run_of_tasks) * run->layers * PHASES * chain->members);
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
    for (int index = 0; scratch && index < run->layers * PHASES; index++) {
        struct phase *phase = &chain->phases[index];
        atomic_init(&phase->done, 0);
        phase->shares = share(phase_tasks(run, index / PHASES, index % PHASES), chain->members, runs);
        runs += chain->members;
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
