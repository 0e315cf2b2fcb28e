/* The CUDA that `product.cu` is written in, on a processor: each thread of a block is a thread of the system, blocks run
 * one after the other. In place of `machine.cuh`; FORMAT, BF16, THREADS and TABLE as there. */

#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

using std::max;
using std::min;

typedef unsigned int word;
typedef unsigned short value;

#define __device__
#define __forceinline__ inline
#define __global__
#define __constant__ static const
#define __launch_bounds__(threads)
#define __shared__
#define __align__(bytes)

struct alignas(8) uint2 {
    word x, y;
};
struct alignas(16) uint4 {
    word x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct index_of {
    int x;
};
static thread_local index_of threadIdx, blockIdx, blockDim, gridDim;

#define SHARED_BYTES (99 << 10)
#define BARRIERS 16
alignas(128) word shared[SHARED_BYTES / 4];

/* What the threads of the block meet at, and what the lanes of a warp hand each other. */
static struct {
    pthread_barrier_t all, warps[32], numbered[BARRIERS];
    int expected[BARRIERS];
    pthread_mutex_t making;
    word handed[32][32][6];
} block;

static uint4 make_uint4(word x, word y, word z, word w) { return {x, y, z, w}; }

template <class T>
static T __ldcs(const T *from) {
    if ((uintptr_t)from % alignof(T)) abort(); /* as a card does */
    return *from;
}

static float __uint_as_float(word bits) {
    float found;
    memcpy(&found, &bits, 4);
    return found;
}

static word __float_as_uint(float x) {
    word bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static float __fmul_rn(float a, float b) { return a * b; }
static float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
#define __expf expf /* the C library has the name */

static word __byte_perm(word low, word high, word selector) {
    unsigned char bytes[8], found[4];
    memcpy(bytes, &low, 4), memcpy(bytes + 4, &high, 4);
    for (int i = 0; i < 4; i++) found[i] = bytes[selector >> 4 * i & 7];
    word joined;
    memcpy(&joined, found, 4);
    return joined;
}

static void __syncthreads() { pthread_barrier_wait(&block.all); }
static void __syncwarp() { pthread_barrier_wait(&block.warps[threadIdx.x / 32]); }

static void wait_at(int barrier, int threads) {
    if (barrier < 0 || barrier >= BARRIERS) abort();
    pthread_mutex_lock(&block.making);
    if (!block.expected[barrier]) pthread_barrier_init(&block.numbered[barrier], 0, threads);
    if (block.expected[barrier] && block.expected[barrier] != threads) abort();
    block.expected[barrier] = threads;
    pthread_mutex_unlock(&block.making);
    pthread_barrier_wait(&block.numbered[barrier]);
}

static float widen(value x) {
#if BF16
    return __uint_as_float((word)x << 16);
#else
    _Float16 half;
    memcpy(&half, &x, 2);
    return half;
#endif
}

static value narrow(float x) {
#if BF16
    if (x != x) return 0x7fff;
    word bits = __float_as_uint(x);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
#else
    _Float16 half = x;
    value bits;
    memcpy(&bits, &half, 2);
    return bits;
#endif
}

static word narrow_two(float low, float high) { return narrow(low) | (word)narrow(high) << 16; }

/* m16n8k16: lane 4 g + t has rows g and g + 8 of a and column g of b at the columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9, and
 * of the sums rows g and g + 8 at 2 t and 2 t + 1. */
static void multiply(float sums[4], const word a[4], word b0, word b1) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    word(*handed)[6] = block.handed[warp];
    memcpy(handed[lane], a, 16);
    handed[lane][4] = b0, handed[lane][5] = b1;
    __syncwarp();
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) {
            const int t = k % 8 / 2, shift = k % 2 * 16;
            const word left = handed[row % 8 * 4 + t][row / 8 + k / 8 * 2], right = handed[column * 4 + t][4 + k / 8];
            sums[i] += widen(left >> shift) * widen(right >> shift);
        }
    }
    __syncwarp();
}

static word shared_address(const word *place) { return (place - shared) * 4; }

static word look_up(word address, word number) {
    if (address + number * 128 + 4 > SHARED_BYTES) abort();
    return shared[address / 4 + number * 32];
}

struct launch {
    void (*kernel)(void **arguments);
    void **arguments;
    int block, blocks, thread, threads;
};

static void *run_thread(void *given) {
    const launch &own = *(const launch *)given;
    threadIdx.x = own.thread, blockDim.x = own.threads, blockIdx.x = own.block, gridDim.x = own.blocks;
    own.kernel(own.arguments);
    return 0;
}

/* Runs all blocks. Shared memory beyond what was asked for must stay as it was: else the process ends. */
static void run_blocks(void (*kernel)(void **), void **arguments, int blocks, int threads, int shared_bytes) {
    for (int number = 0; number < blocks; number++) {
        memset(&block, 0, sizeof block);
        memset(shared, 0x7f, sizeof shared); /* numbers that no sum may have in it */
        pthread_mutex_init(&block.making, 0);
        pthread_barrier_init(&block.all, 0, threads);
        for (int warp = 0; warp < threads / 32; warp++) pthread_barrier_init(&block.warps[warp], 0, 32);
        pthread_attr_t small;
        pthread_attr_init(&small), pthread_attr_setstacksize(&small, 256 << 10);
        std::vector<launch> launches(threads);
        std::vector<pthread_t> running(threads);
        for (int thread = 0; thread < threads; thread++) {
            launches[thread] = {kernel, arguments, number, blocks, thread, threads};
            if (pthread_create(&running[thread], &small, run_thread, &launches[thread])) abort();
        }
        for (pthread_t thread : running) pthread_join(thread, 0);
        for (int index = shared_bytes / 4; index < SHARED_BYTES / 4; index++)
            if (shared[index] != 0x7f7f7f7f) fprintf(stderr, "shared memory written at %d\n", index * 4), abort();
    }
}
