/* What CUDA has no words for: conversions, the matrix units, shared memory by its address, barriers of some warps.
 *
 * Numbers are bfloat16 (BF16 1) or half (BF16 0) in memory, fp32 in between. */

typedef unsigned int word;
typedef unsigned short value;

__device__ __forceinline__ float widen(value x) {
#if BF16
    return __uint_as_float((word)x << 16);
#else
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
#endif
}

__device__ __forceinline__ value narrow(float x) {
    value y;
#if BF16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
#endif
    return y;
}

__device__ __forceinline__ word narrow_two(float low, float high) {
    word y;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#endif
    return y;
}

/* sums += a (16 weight rows, 16 columns) * b (16 columns, 8 rows of x) */
__device__ __forceinline__ void multiply(float sums[4], const word a[4], word b0, word b1) {
#if BF16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* An address in shared memory as the functions below take it. */
__device__ __forceinline__ word shared_address(const word *place) { return __cvta_generic_to_shared(place); }

/* The word that stands so many times 128 bytes behind an address. Volatile: it stays behind the barrier that follows
 * the writing. */
__device__ __forceinline__ word look_up(word address, word number) {
    word found;
    asm volatile("{.reg .u32 place; mad.lo.u32 place, %1, 128, %2; ld.shared.u32 %0, [place];}"
                 : "=r"(found)
                 : "r"(number), "r"(address));
    return found;
}

/* Waits until so many threads of a block wait at a barrier, 0 to 15. */
__device__ __forceinline__ void wait_at(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
