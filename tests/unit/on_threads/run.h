/* Behind `product.cu`: its kernels by their numbers. Tensors are passed as they are, whole numbers by their place. */

#define POINTER(type, index) ((type *)arguments[index])
#define NUMBER(index) (*(int *)arguments[index])
#define ENTRY(NAME)                                                                                                    \
    static void run_##NAME(void **arguments) {                                                                         \
        NAME(POINTER(const value, 0), POINTER(const unsigned char, 1), POINTER(const unsigned char, 2),                \
             POINTER(const unsigned char, 3), POINTER(const float, 4), POINTER(const float, 5),                        \
             POINTER(const float, 6), NUMBER(7), NUMBER(8), POINTER(const value, 9), POINTER(const value, 10),         \
             POINTER(value, 11), NUMBER(12), NUMBER(13), NUMBER(14), NUMBER(15), NUMBER(16));                          \
    }

ENTRY(plain_8)
ENTRY(plain_16)
ENTRY(gated_8)
ENTRY(gated_16)

extern "C" void run(int kernel, int blocks, int threads, int shared_bytes, void **arguments) {
    void (*const kernels[])(void **) = {run_plain_8, run_plain_16, run_gated_8, run_gated_16};
    run_blocks(kernels[kernel], arguments, blocks, threads, shared_bytes);
}
