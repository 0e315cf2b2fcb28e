/* Products of up to 16 rows with a weight as it lies in memory, on the matrix units of NVIDIA's cards from 8.0 on.
 *
 * A team of warps computes a tile of 16 rows of the weight, then the next tile that is its own. The warps of a team
 * take turns at groups of pieces of 64 columns, and their sums are added in order. Each thread reads 16 neighbouring
 * columns of two weight rows and multiplies them where it has them: the matrix instruction wants other columns in its
 * place, but any order does while rows of x use the same one. So a weight goes from memory straight to registers, and a
 * row's bits depend on the weight's shape and the card alone.
 *
 * Two codes of nf4, a byte, are looked up together in shared memory, where each lane has a bank and so a table of its
 * own: an integer instruction for a code. Permuting bytes in registers takes three, and the product waits for those.
 *
 * Behind machine.cuh, compiled with FORMAT (0 dense, 1 int8, 2 nf4), BF16 (1: bfloat16, 0: half) and THREADS (the most
 * of a block) defined; TABLE holds nf4's 16 values in that type. Knows no models. */

#define PIECE 64
#define TILE 16
#define SHARE 16 /* columns of a piece that one thread has: a quarter */

/* Words of a thread's 16 columns of one weight row, as they lie; and pieces that a warp reads at a time, a turn ahead:
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

/* A thread's 16 columns of a piece of one weight row, as they lie. */
struct sixteen {
    word words[WORDS];
};

#define PIECE_BYTES (PIECE * WORDS / 4)

__device__ __forceinline__ sixteen load_codes(const unsigned char *from) {
    sixteen found;
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

#if FORMAT == 2
#define TABLE_WORDS (256 * 32)

__constant__ value values_of_codes[16] = {TABLE};

/* Pairs of values by their byte of codes, the high half first, once for each lane. */
__device__ __forceinline__ void fill_table(word *pairs) {
    for (int index = threadIdx.x; index < TABLE_WORDS / 4; index += blockDim.x) {
        int byte = index / 8;
        word pair = values_of_codes[byte >> 4] | (word)values_of_codes[byte & 15] << 16;
        ((uint4 *)pairs)[index] = make_uint4(pair, pair, pair, pair);
    }
}

/* Byte number 0 to 3 of a word, as a pair of values; ``table`` is where the lane's own begins. */
__device__ __forceinline__ word pair_of(word table, word four, int number) {
    return look_up(table, number ? __byte_perm(four, 0, 0x4440 | number) : four & 0xff);
}
#else
#define TABLE_WORDS 0
#endif

/* Four neighbouring columns (number 0 to 3 of the thread's fours) as two pairs of values. */
__device__ __forceinline__ void four_values(word table, const sixteen &from, int number, word &first, word &second) {
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
    first = pair_of(table, from.words[number / 2], number % 2 * 2);
    second = pair_of(table, from.words[number / 2], number % 2 * 2 + 1);
#endif
}

/* Up to three weights, one below the other: where their codes and scales lie, and the rows that the later begin at. */
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

    /* int8's scale of a row. */
    __device__ __forceinline__ float scale_of(int row) const {
        const unsigned char *codes;
        const float *scales;
        find(row, codes, scales);
        return scales[row];
    }
};

/* Where a thread's share of the first piece of its two weight rows lies, and where their scales do. */
struct rows_of_weight {
    const unsigned char *codes[2];
    const float *scales[2];
};

/* A thread's share of GROUP neighbouring pieces of two weight rows, from piece ``start`` on. */
struct share_of_group {
    sixteen codes[GROUP][2];
    float scales[GROUP][2];

    __device__ __forceinline__ void load(const rows_of_weight &from, int start, bool aligned) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const unsigned char *own = from.codes[j] + (long long)start * PIECE_BYTES;
#pragma unroll
            for (int i = 0; i < GROUP; i++) codes[i][j] = load_codes(own + i * PIECE_BYTES);
#if FORMAT == 2
            const float *of_own = from.scales[j] + start;
            if (aligned) {
                float4 four = __ldcs((const float4 *)of_own);
                scales[0][j] = four.x, scales[1][j] = four.y, scales[2][j] = four.z, scales[3][j] = four.w;
            } else {
#pragma unroll
                for (int i = 0; i < GROUP; i++) scales[i][j] = __ldcs(of_own + i);
            }
#endif
        }
    }
};

/* A thread's share of a piece of the rows of x: 16 columns of each eighth row. Where there is no such row, it is the
 * last one again, or zeros for nf4, whose tables keep shared memory busy enough: its sums are not stored. */
template <int EIGHTS>
struct share_of_x {
    const value *rows[EIGHTS];
    bool there[EIGHTS];
    word pairs[EIGHTS][SHARE / 2] = {};

    __device__ __forceinline__ void load(int piece) {
#pragma unroll
        for (int eight = 0; eight < EIGHTS; eight++) {
            if (FORMAT == 2 && !there[eight]) continue;
            const uint4 *from = (const uint4 *)(rows[eight] + piece * PIECE);
#pragma unroll
            for (int j = 0; j < SHARE / 8; j++) {
                uint4 four = from[j];
                pairs[eight][4 * j] = four.x, pairs[eight][4 * j + 1] = four.y;
                pairs[eight][4 * j + 2] = four.z, pairs[eight][4 * j + 3] = four.w;
            }
        }
    }
};

/* sums += a piece of the weight times a piece of x if it counts; nf4's scales hold for just a piece */
template <int EIGHTS>
__device__ __forceinline__ void multiply_piece(float sums[EIGHTS][4], const sixteen weight[2], const float scales[2],
                                               const share_of_x<EIGHTS> &x, word table, bool counts) {
    if (FORMAT != 2 && !counts) return;
    float own[EIGHTS][4] = {};
#pragma unroll
    for (int four = 0; four < SHARE / 4; four++) {
        word a[4];
        four_values(table, weight[0], four, a[0], a[2]);
        four_values(table, weight[1], four, a[1], a[3]);
#pragma unroll
        for (int eight = 0; eight < EIGHTS; eight++)
            multiply(FORMAT == 2 ? own[eight] : sums[eight], a, x.pairs[eight][2 * four], x.pairs[eight][2 * four + 1]);
    }
#if FORMAT == 2
#pragma unroll
    for (int eight = 0; eight < EIGHTS; eight++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (counts) sums[eight][j] = __fmaf_rn(own[eight][j], scales[j / 2], sums[eight][j]);
#endif
}

/* Waits for the warps of a team. Barriers have the numbers 0 to 15, and teams of two warps or more are not as many. */
static_assert(THREADS / 64 <= 16, "a barrier for each team");

__device__ __forceinline__ void wait_for_team(int team, int size) {
    if (size == 1)
        __syncwarp();
    else
        wait_at(team, 32 * size);
}

/* Where a thread's two rows of a tile lie; rows beyond the last are read as row 0 and not stored. */
template <bool GATED>
__device__ __forceinline__ rows_of_weight rows_of_tile(const matrix &weight, int tile, int outputs, int columns) {
    const int row = threadIdx.x % 32 / 4, share = threadIdx.x % 4;
    const int first = tile * (GATED ? TILE / 2 : TILE) + row, second = GATED ? first + outputs : first + 8;
    int places[2] = {first < outputs ? first : 0, second < (GATED ? 2 : 1) * outputs ? second : 0};
    rows_of_weight from;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        weight.find(places[i], from.codes[i], from.scales[i]);
        from.codes[i] += (long long)places[i] * (columns / PIECE) * PIECE_BYTES + share * WORDS * 4;
        from.scales[i] += (long long)places[i] * (FORMAT == 2 ? columns / PIECE : 1);
    }
    return from;
}

/* What is stored of a tile: the sums of a team's warps, each (TILE, WIDTH) in ``parts``, with all that comes behind. */
template <bool GATED, int WIDTH>
__device__ __forceinline__ void store_tile(const float *parts, int size, int thread, const matrix &weight,
                                           const value *bias, const value *residual, value *out, int tile, int rows,
                                           int outputs) {
    const int each = GATED ? TILE / 2 : TILE;
    for (int index = thread; index < each * rows; index += 32 * size) {
        int output = tile * each + index % each, row = index / each;
        if (output >= outputs) continue;
        const float *from = parts + index % each * WIDTH + row;
        float sum = 0, up = 0;
        for (int i = 0; i < size; i++) {
            sum += from[i * TILE * WIDTH];
            if (GATED) up += from[(i * TILE + 8) * WIDTH];
        }
#if FORMAT == 1
        sum = __fmul_rn(sum, weight.scale_of(output));
        if (GATED) up *= weight.scale_of(output + outputs);
#endif
        long long place = (long long)row * outputs + output;
        if (GATED) {
            float gate = widen(narrow(sum));
            out[place] = narrow(widen(narrow(gate / (1.0f + __expf(-gate)))) * widen(narrow(up)));
            continue;
        }
        if (bias) sum += widen(bias[output]);
        out[place] = residual ? narrow(widen(residual[place]) + widen(narrow(sum))) : narrow(sum);
    }
}

/* Copies the rows of x, each 8 values further on than it was: apart from each other's banks. */
__device__ __forceinline__ void copy_rows(value *copy, const value *x, int rows, int columns) {
    for (int index = threadIdx.x * 8; index < rows * columns; index += blockDim.x * 8)
        *(uint4 *)(copy + index + index / columns * 8) = *(const uint4 *)(x + index);
}

/* Stores a warp's sums of a tile, (TILE, 8 * EIGHTS), and begins again at 0. */
template <int EIGHTS>
__device__ __forceinline__ void store_sums(float *to, float sums[EIGHTS][4]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int eight = 0; eight < EIGHTS; eight++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            to[(lane / 4 + j / 2 * 8) * 8 * EIGHTS + eight * 8 + lane % 4 * 2 + j % 2] = sums[eight][j];
            sums[eight][j] = 0;
        }
}

/* x: (rows, columns); out: (rows, outputs). GATED: the first weights are gates and the rest ups, as many, and
 * out = silu(gate) * up. bias (outputs) and residual (rows, outputs) may be null.
 * Threads: 32 for each warp of each team of ``size``. Shared memory: the table; parts of sums, (2, warps, TILE,
 * 8 * EIGHTS), for one tile after the other; and if ``copied``, x (rows, columns + 8). */
template <bool GATED, int EIGHTS>
__device__ __forceinline__ void product(const value *x, const matrix &weight, const value *bias, const value *residual,
                                        value *out, int rows, int outputs, int columns, int size, int copied) {
    extern __shared__ __align__(16) word shared[];
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int team = warp / size, member = warp % size, part = TILE * 8 * EIGHTS, each = GATED ? TILE / 2 : TILE;
    const int tiles = (outputs + each - 1) / each, stride = gridDim.x * (warps / size);
    const int pieces = columns / PIECE, groups = (pieces + GROUP - 1) / GROUP;
    int tile = team * gridDim.x + blockIdx.x, group = member, x_stride = columns;
    float *parts = (float *)(shared + TABLE_WORDS) + team * size * part, *other_parts = parts + warps * part;
    share_of_group now, next;
    rows_of_weight from = rows_of_tile<GATED>(weight, min(tile, tiles - 1), outputs, columns);
    now.load(from, min(group * GROUP, pieces - GROUP), pieces % GROUP == 0);
#if FORMAT == 2
    fill_table(shared);
#else
    if (copied) {
        value *copy = (value *)(shared + TABLE_WORDS + 2 * warps * part);
        copy_rows(copy, x, rows, columns);
        x = copy, x_stride += 8;
    }
#endif
    const word table = shared_address(shared + lane);
    share_of_x<EIGHTS> of_x;
#pragma unroll
    for (int eight = 0; eight < EIGHTS; eight++) {
        const int row = eight * 8 + lane / 4;
        of_x.there[eight] = row < rows;
        of_x.rows[eight] = x + min(row, rows - 1) * x_stride + lane % 4 * SHARE;
    }
    __syncthreads();
    float sums[EIGHTS][4] = {};
    while (tile < tiles) {
        /* the last group of a row may begin within the one before it: those pieces count there */
        const int skipped = max(0, group * GROUP - (pieces - GROUP)), start = group * GROUP - skipped, this_tile = tile;
        group += size;
        const bool last = group >= groups;
        if (last) group = member, tile += stride;
        if (tile < tiles) {
            if (last) from = rows_of_tile<GATED>(weight, tile, outputs, columns);
            next.load(from, min(group * GROUP, pieces - GROUP), pieces % GROUP == 0);
        }
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            of_x.load(start + i);
            multiply_piece<EIGHTS>(sums, now.codes[i], now.scales[i], of_x, table, i >= skipped);
        }
        if (last) {
            store_sums<EIGHTS>(parts + member * part, sums);
            wait_for_team(team, size);
            store_tile<GATED, 8 * EIGHTS>(parts, size, member * 32 + lane, weight, bias, residual, out, this_tile, rows,
                                          outputs);
            __syncwarp();
            float *swapped = parts; /* the next tile's sums go where nobody reads any more */
            parts = other_parts, other_parts = swapped;
        }
        now = next; /* waits for it */
    }
}

#define KERNEL(NAME, GATED, EIGHTS)                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                             \
        NAME(const value *x, const unsigned char *codes0, const unsigned char *codes1, const unsigned char *codes2,   \
             const float *scales0, const float *scales1, const float *scales2, int start1, int start2,                \
             const value *bias, const value *residual, value *out, int rows, int outputs, int columns, int size,      \
             int copied) {                                                                                            \
        matrix weight = {codes0, codes1, codes2, scales0, scales1, scales2, start1, start2};                          \
        product<GATED, EIGHTS>(x, weight, bias, residual, out, rows, outputs, columns, size, copied);                 \
    }

KERNEL(plain_8, false, 1)
KERNEL(plain_16, false, 2)
KERNEL(gated_8, true, 1)
KERNEL(gated_16, true, 2)
