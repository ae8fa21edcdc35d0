/* The fused norm on a CPU: what Python passes, and what each instruction set provides.
 *
 * Formulas, and the meaning of bits and extremes: ../reference.py. Layouts: ../layout.py.
 * Nothing here knows torch: pointers, sizes, and a function that runs a loop on several threads.
 */
#ifndef LOWPREC_NORM_H
#define LOWPREC_NORM_H

#include <stdint.h>

/* Grows with every change of the structs below; ../native.py refuses a library of another number. */
#define LOWPREC_ABI 1

enum { LANES = 16 }; /* elements that a step of every inner loop takes */
enum { BITS_NONE, BITS_SIGN, BITS_ACTIVE };

/* x[sample][channel][place] for planes; x[sample][channel] with length 1 for rows. */
struct shape {
    int64_t samples, channels, length;
    int32_t rows;    /* whether the channel is the innermost axis */
    int32_t type;    /* 0 float32, 1 float16, 2 bfloat16 */
    int32_t isa;     /* index into the table of norm.c */
    int32_t threads;
    int32_t stream;  /* whether the result is written around the cache */
    int32_t k;       /* 0: L1; else how many deviations the scale averages */
    double constant; /* of the scale: sqrt(pi/2), or C(n) */
};

struct forward {
    struct shape shape;
    const void *x, *residual;  /* residual: or NULL */
    const float *weight, *bias; /* or NULL */
    void *y;
    float *mean, *scale;
    uint8_t *bits;     /* by bits_kind */
    int64_t *extremes; /* channels x k */
    double eps;
    int32_t relu, bits_kind;
};

struct backward {
    struct shape shape;
    const void *grad_y, *kept; /* kept: y if from_output, else x */
    const float *mean, *scale, *weight, *bias, *grad_mean, *grad_scale; /* the last four: or NULL */
    const uint8_t *bits;
    const int64_t *extremes;
    void *dx, *dresidual; /* dresidual: or NULL */
    float *dweight, *dbias;
    int32_t relu, from_output;
};

/* Runs task(context, i, worker) for i = 0 .. count - 1; worker < threads tells which thread it is. */
typedef void (*task_fn)(const void *context, int64_t i, int worker);
void run_parallel(task_fn task, const void *context, int64_t count, int threads);

struct kernels {
    int (*forward)(const struct forward *);   /* 0, or -1 when there is no memory */
    int (*backward)(const struct backward *);
};

extern const struct kernels portable_kernels[3], avx2_kernels[3], avx512_kernels[3];

/* The k largest values so far, sorted, and their places; of equals the first. Values are not negative: -1 is free. */
struct top {
    float *values;
    int64_t *places;
    int k;
};
struct top top_empty(float *values, int64_t *places, int k);
void top_insert(struct top *top, float value, int64_t place);

/* What the four passes of one channel come to, shared by all instruction sets (norm.c). */
void finish_mean(const struct forward *f, int64_t c, double first, double sum);
void finish_l1(const struct forward *f, int64_t c, double sum);
void finish_top(const struct forward *f, int64_t c, const struct top *top);
struct coefficients { /* dx = factor * g + (d >= 0 ? above : below), +- spike at the extremes */
    float factor, above, below, spike;
};
struct coefficients finish_backward(const struct backward *b, int64_t c, double sum, double moment, double positive);

#endif
