/* Products of up to 16 rows with a weight as it lies in memory, on the matrix units of NVIDIA's cards from 8.0 on.
 *
 * A program computes a tile of 16 rows of the weight. Its warps take turns at pieces of 64 columns, and their sums are
 * added in order. Each thread reads 16 neighbouring columns of two weight rows and multiplies them where it has them: the
 * matrix instruction wants other columns in its place, but any order does while rows of x use the same one. So a weight
 * goes from memory to the matrix unit without shared memory, and a row's bits depend on the weight's shape alone.
 *
 * Compiled with FORMAT (0 dense, 1 int8, 2 nf4) and BF16 (1: bfloat16, 0: half) defined; TABLE holds nf4's values as eight
 * words, the lower bytes of all 16 values and then the upper ones. Knows no models. */

typedef unsigned int word;
typedef unsigned short value;

#define PIECE 64
#define TILE 16
#define SHARE 16 /* columns of a piece that one thread has: a quarter */

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

/* Words of a thread's 16 columns of one weight row, as they lie; and pieces that a warp reads at a time, one turn ahead:
 * so many bytes under way that memory's latency is covered. */
#if FORMAT == 0
#define WORDS 8
#define GROUP 1
#elif FORMAT == 1
#define WORDS 4
#define GROUP 2
#else
#define WORDS 2
#define GROUP 4
#endif

struct codes {
    word words[WORDS];
};

__device__ __forceinline__ codes load_codes(const unsigned char *row, int piece, int share) {
    codes found;
    const unsigned char *from = row + (long long)piece * PIECE * WORDS / 8 * 2 + share * WORDS * 4;
#if FORMAT == 2
    uint2 two = __ldcs((const uint2 *)from);
    found.words[0] = two.x, found.words[1] = two.y;
#else
    for (int i = 0; i < WORDS / 4; i++) {
        uint4 four = __ldcs((const uint4 *)from + i);
        found.words[4 * i] = four.x, found.words[4 * i + 1] = four.y;
        found.words[4 * i + 2] = four.z, found.words[4 * i + 3] = four.w;
    }
#endif
    return found;
}

/* Four neighbouring columns (number 0 to 3 of the thread's fours) as two pairs of values. */
__device__ __forceinline__ void four_values(const codes &from, int number, word &first, word &second) {
#if FORMAT == 0
    first = from.words[2 * number], second = from.words[2 * number + 1];
#elif FORMAT == 1
    float wide[4];
    for (int i = 0; i < 4; i++) { /* 2^23 + (code + 128), less 2^23 + 128: exact */
        word bits = __byte_perm(from.words[number] ^ 0x80808080u, 0x4b000000u, 0x7650 | i);
        wide[i] = __uint_as_float(bits) - 8388736.0f;
    }
    first = narrow_two(wide[0], wide[1]), second = narrow_two(wide[2], wide[3]);
#else
    const word table[8] = {TABLE};
    word sixteen = number & 1 ? from.words[number >> 1] >> 16 : from.words[number >> 1];
    word low = sixteen & 0x7777, pick = (sixteen >> 1 & 0x4444) | 0x3210;
    word lows = __byte_perm(__byte_perm(table[0], table[1], low), __byte_perm(table[2], table[3], low), pick);
    word highs = __byte_perm(__byte_perm(table[4], table[5], low), __byte_perm(table[6], table[7], low), pick);
    first = __byte_perm(lows, highs, 0x4051), second = __byte_perm(lows, highs, 0x6273);
#endif
}

/* Up to three weights, one below the other: where their codes and scales lie, and the rows that the later ones begin at. */
struct matrix {
    const unsigned char *codes0, *codes1, *codes2;
    const float *scales0, *scales1, *scales2;
    int start1, start2;

    /* The codes and scales of the weight that has a row, which becomes a number within it. */
    __device__ __forceinline__ void find(int &row, const unsigned char *&codes, const float *&scales) const {
        codes = row >= start2 ? codes2 : row >= start1 ? codes1 : codes0;
        scales = row >= start2 ? scales2 : row >= start1 ? scales1 : scales0;
        row -= row >= start2 ? start2 : row >= start1 ? start1 : 0;
    }
};

/* Where a thread's two weight rows begin, and where their scales do. */
struct rows_of_weight {
    const unsigned char *codes[2];
    const float *scales[2];
};

/* A thread's share of GROUP neighbouring pieces of two weight rows. */
struct share_of_group {
    codes values[GROUP][2];
    float scales[GROUP][2];

    __device__ __forceinline__ void load(const rows_of_weight &from, int group, int pieces) {
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            int piece = min(group * GROUP + i, pieces - 1);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                values[i][j] = load_codes(from.codes[j], piece, threadIdx.x % 4);
#if FORMAT == 2
                scales[i][j] = __ldcs(from.scales[j] + piece);
#endif
            }
        }
    }
};

/* A thread's share of a piece of the rows of x: 16 columns of each eighth row. */
template <int EIGHTS>
struct share_of_x {
    word pairs[EIGHTS][SHARE / 2];

    __device__ __forceinline__ void load(const value *x, int rows, int columns, int piece) {
#pragma unroll
        for (int eight = 0; eight < EIGHTS; eight++) {
            int row = eight * 8 + threadIdx.x % 32 / 4;
            const uint4 *from = (const uint4 *)(x + (long long)row * columns + piece * PIECE + threadIdx.x % 4 * SHARE);
#pragma unroll
            for (int j = 0; j < SHARE / 8; j++) {
                uint4 four = row < rows ? from[j] : make_uint4(0, 0, 0, 0);
                pairs[eight][4 * j] = four.x, pairs[eight][4 * j + 1] = four.y;
                pairs[eight][4 * j + 2] = four.z, pairs[eight][4 * j + 3] = four.w;
            }
        }
    }
};

/* sums += a piece of the weight times a piece of x; nf4's scales hold for just a piece */
template <int EIGHTS>
__device__ __forceinline__ void multiply_piece(float sums[EIGHTS][4], const codes weight[2], const float scales[2],
                                               const share_of_x<EIGHTS> &x) {
    float own[EIGHTS][4] = {};
#pragma unroll
    for (int four = 0; four < SHARE / 4; four++) {
        word a[4];
        four_values(weight[0], four, a[0], a[2]);
        four_values(weight[1], four, a[1], a[3]);
#pragma unroll
        for (int eight = 0; eight < EIGHTS; eight++)
            multiply(FORMAT == 2 ? own[eight] : sums[eight], a, x.pairs[eight][2 * four], x.pairs[eight][2 * four + 1]);
    }
#if FORMAT == 2
#pragma unroll
    for (int eight = 0; eight < EIGHTS; eight++)
#pragma unroll
        for (int j = 0; j < 4; j++) sums[eight][j] += own[eight][j] * scales[j / 2];
#endif
}

/* x: (rows, columns); out: (rows, outputs). GATED: the first weight has gates and the second ups, as many, and
 * out = silu(gate) * up.
 * bias (outputs) and residual (rows, outputs) may be null. Blocks: one per tile; threads: 32 for each warp. */
template <bool GATED, int EIGHTS>
__device__ __forceinline__ void product(const value *x, const matrix &weight, const value *bias,
                                        const value *residual, value *out, int rows, int outputs, int columns) {
    extern __shared__ float parts[]; /* (warps, TILE, 8 * EIGHTS) */
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = lane / 4, share = lane % 4;
    const int each = GATED ? TILE / 2 : TILE, tile = blockIdx.x * each;
    const int first_row = tile + group, second_row = GATED ? tile + group + outputs : tile + group + 8;
    const int pieces = columns / PIECE, groups = (pieces + GROUP - 1) / GROUP;
    rows_of_weight from; /* rows beyond the last are read as row 0 and not stored */
    int places[2] = {first_row < outputs ? first_row : 0, second_row < (GATED ? 2 : 1) * outputs ? second_row : 0};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        weight.find(places[i], from.codes[i], from.scales[i]);
        from.codes[i] += (long long)places[i] * columns * WORDS / 4;
        from.scales[i] += (long long)places[i] * (FORMAT == 2 ? pieces : 1);
    }
    float sums[EIGHTS][4] = {};
    share_of_group now, next;
    share_of_x<EIGHTS> x_now, x_next;
    if (warp < groups) {
        now.load(from, warp, pieces);
        x_now.load(x, rows, columns, warp * GROUP);
    }
    for (int number = warp; number < groups; number += warps) {
        next.load(from, min(number + warps, groups - 1), pieces);
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            int following = i + 1 < GROUP ? number * GROUP + i + 1 : (number + warps) * GROUP;
            x_next.load(x, rows, columns, min(following, pieces - 1));
            if (number * GROUP + i < pieces) multiply_piece<EIGHTS>(sums, now.values[i], now.scales[i], x_now);
            x_now = x_next;
        }
        now = next;
    }
    const int width = 8 * EIGHTS;
#pragma unroll
    for (int eight = 0; eight < EIGHTS; eight++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            parts[(warp * TILE + group + j / 2 * 8) * width + eight * 8 + share * 2 + j % 2] = sums[eight][j];
    __syncthreads();
    for (int index = threadIdx.x; index < each * rows; index += blockDim.x) {
        int output = index % each, row = index / each;
        if (tile + output >= outputs) continue;
        float sum = 0, up = 0;
        for (int i = 0; i < warps; i++) {
            sum += parts[(i * TILE + output) * width + row];
            if (GATED) up += parts[(i * TILE + output + 8) * width + row];
        }
#if FORMAT == 1
        int place_of = tile + output;
        const unsigned char *codes_of;
        const float *scales_of;
        weight.find(place_of, codes_of, scales_of);
        sum *= scales_of[place_of];
        if (GATED) up *= weight.scales1[place_of];
#endif
        long long place = (long long)row * outputs + tile + output;
        if (GATED) {
            float gate = widen(narrow(sum));
            out[place] = narrow(widen(narrow(gate / (1.0f + __expf(-gate)))) * widen(narrow(up)));
            continue;
        }
        if (bias) sum += widen(bias[tile + output]);
        out[place] = residual ? narrow(widen(residual[place]) + widen(narrow(sum))) : narrow(sum);
    }
}

#define KERNEL(NAME, GATED, EIGHTS)                                                                                        \
    extern "C" __global__ void __launch_bounds__(FORMAT == 0 ? 768 : 512)                                                  \
        NAME(const value *x, const unsigned char *codes0, const unsigned char *codes1, const unsigned char *codes2,        \
             const float *scales0, const float *scales1, const float *scales2, int start1, int start2, const value *bias,  \
             const value *residual, value *out, int rows, int outputs, int columns) {                                      \
        matrix weight = {codes0, codes1, codes2, scales0, scales1, scales2, start1, start2};                               \
        product<GATED, EIGHTS>(x, weight, bias, residual, out, rows, outputs, columns);                                    \
    }

KERNEL(plain_8, false, 1)
KERNEL(plain_16, false, 2)
KERNEL(gated_8, true, 1)
KERNEL(gated_16, true, 2)
