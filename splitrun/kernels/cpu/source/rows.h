/* Runs nf4_rows and int8_rows of the including file, compiled for each number of rows up to MOST_AT_ONCE. */
#define EACH_COUNT(call)                  \
    switch (at_once) {                    \
        case 1: call(1); break;           \
        case 2: call(2); break;           \
        case 3: call(3); break;           \
        case 4: call(4); break;           \
        EACH_LARGER_COUNT(call)           \
    }
#if MOST_AT_ONCE == 8
#define EACH_LARGER_COUNT(call)           \
        case 5: call(5); break;           \
        case 6: call(6); break;           \
        case 7: call(7); break;           \
        default: call(8); break;
#else
#define EACH_LARGER_COUNT(call)
#endif

ALWAYS_INLINE struct activations rows_from(const struct activations *x, int row) {
    struct activations rest = *x;
    rest.codes += row * x->code_stride;
    rest.scales += row * x->group_stride;
    rest.offsets += row * x->group_stride;
    return rest;
}

static void nf4_tile(const uint8_t *lines, int64_t columns, const struct activations *x, int rows, float *sums) {
    for (int row = 0; row < rows; row += MOST_AT_ONCE) {
        int at_once = rows - row < MOST_AT_ONCE ? rows - row : MOST_AT_ONCE;
        struct activations part = rows_from(x, row);
#define CALL(count) nf4_rows(count, lines, columns, &part, sums + row * TILE)
        EACH_COUNT(CALL)
#undef CALL
    }
}

static void int8_tile(const uint8_t *lines, int64_t columns, const struct activations *x, int rows, float *sums) {
    for (int row = 0; row < rows; row += MOST_AT_ONCE) {
        int at_once = rows - row < MOST_AT_ONCE ? rows - row : MOST_AT_ONCE;
        struct activations part = rows_from(x, row);
#define CALL(count) int8_rows(count, lines, columns, &part, sums + row * TILE)
        EACH_COUNT(CALL)
#undef CALL
    }
}
