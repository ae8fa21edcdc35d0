/* Entry points, the choice of instruction set, threads, and the arithmetic of one channel between the passes. */
#include "norm.h"

#include <math.h>
#include <stddef.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

int32_t lowprec_abi(void) { return LOWPREC_ABI; }

/* The instruction sets of this processor, as bits: 1 portable, 2 AVX2, 4 AVX-512. */
int32_t lowprec_instruction_sets(void) {
    int32_t sets = 1;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) sets |= 2;
    if ((sets & 2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        sets |= 4;
#endif
    return sets;
}

static const struct kernels *kernels_for(const struct shape *s) {
#if defined(__x86_64__)
    if (s->isa == 2) return &avx512_kernels[s->type];
    if (s->isa == 1) return &avx2_kernels[s->type];
#endif
    return &portable_kernels[s->type];
}

/* A result of 32 MiB or more is new memory every time (glibc maps it anew), and the system needs longer
 * to provide it in pages of 4 KiB than in pages of 2 MiB: ask for those. */
static void ask_for_large_pages(const struct shape *s, void *result) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = 2 << 20;
    uintptr_t size = (uintptr_t)(s->samples * s->channels * s->length) * (s->type ? 2 : 4);
    uintptr_t from = ((uintptr_t)result + page - 1) / page * page, to = ((uintptr_t)result + size) / page * page;
    if (result && size >= 32 << 20) madvise((void *)from, to - from, MADV_HUGEPAGE); /* a wish: failing changes nothing */
#else
    (void)s, (void)result;
#endif
}

int32_t lowprec_norm_forward(const struct forward *f) {
    ask_for_large_pages(&f->shape, f->y);
    return kernels_for(&f->shape)->forward(f);
}

int32_t lowprec_norm_backward(const struct backward *b) {
    ask_for_large_pages(&b->shape, b->dx);
    ask_for_large_pages(&b->shape, b->dresidual);
    return kernels_for(&b->shape)->backward(b);
}

/* Whether |weight| > limit * (|weight| + |bias|) in every channel; see ../choice.py. */
int32_t lowprec_output_suffices(const float *weight, const float *bias, int64_t channels, float limit) {
    for (int64_t c = 0; c < channels; c++)
        if (!(fabsf(weight[c]) > limit * (fabsf(weight[c]) + (bias ? fabsf(bias[c]) : 0)))) return 0;
    return 1;
}

/* Threads: those of the OpenMP runtime that the process has already, so that two pools never compete for the cores. */
typedef void (*gomp_parallel_fn)(void (*)(void *), void *, unsigned, unsigned);
static gomp_parallel_fn gomp_parallel;
void lowprec_use_threads(gomp_parallel_fn found) { gomp_parallel = found; }

struct loop {
    task_fn task;
    const void *context;
    int64_t count, next;
    int workers;
};
static void work(void *argument) {
    struct loop *loop = argument;
    int worker = __atomic_fetch_add(&loop->workers, 1, __ATOMIC_RELAXED);
    for (;;) {
        int64_t i = __atomic_fetch_add(&loop->next, 1, __ATOMIC_RELAXED);
        if (i >= loop->count) return;
        loop->task(loop->context, i, worker);
    }
}
void run_parallel(task_fn task, const void *context, int64_t count, int threads) {
    struct loop loop = {task, context, count, 0, 0};
    int64_t useful = threads < count ? threads : count;
    if (gomp_parallel && useful > 1) gomp_parallel(work, &loop, (unsigned)useful, 0);
    else work(&loop);
}

/* ---- one channel ---- */

static double elements(const struct shape *s) { return (double)s->samples * (double)s->length; }

void finish_mean(const struct forward *f, int64_t c, double first, double sum) {
    f->mean[c] = (float)(first + sum / elements(&f->shape));
}

void finish_l1(const struct forward *f, int64_t c, double sum) {
    f->scale[c] = (float)(f->shape.constant * sum / elements(&f->shape) + f->eps);
}

void finish_top(const struct forward *f, int64_t c, const struct top *top) {
    double sum = 0;
    for (int i = 0; i < top->k; i++) {
        f->extremes[c * top->k + i] = top->places[i];
        sum += top->values[i];
    }
    /* A NaN in the channel makes the mean NaN or infinite, and no deviation compares as larger than that. */
    f->scale[c] = isfinite(f->mean[c]) ? (float)(f->shape.constant * sum / top->k + f->eps) : NAN;
}

struct coefficients finish_backward(const struct backward *b, int64_t c, double sum, double moment, double positive) {
    const double n = elements(&b->shape), scale = b->scale[c], weight = b->weight ? b->weight[c] : 1;
    if (b->from_output) {
        moment -= (b->bias ? b->bias[c] : 0) * sum;
        b->dweight[c] = (float)(moment / weight);
    } else {
        b->dweight[c] = (float)(moment / scale);
        moment *= weight / scale;
    }
    b->dbias[c] = (float)sum;
    const double spread = (b->grad_scale ? b->grad_scale[c] : 0) - moment / scale;
    const double offset = (b->grad_mean ? b->grad_mean[c] : 0) - weight / scale * sum;
    struct coefficients k = {.factor = (float)(weight / scale)};
    if (b->shape.k) {
        double step = spread * b->shape.constant / b->shape.k, signs = 0;
        for (int j = 0; j < b->shape.k; j++) signs += b->extremes[c * b->shape.k + j] < 0 ? -1 : 1;
        k.above = k.below = (float)((offset - step * signs) / n);
        k.spike = (float)step;
    } else {
        double step = spread * b->shape.constant / n, shift = offset / n - step * (2 * positive / n - 1);
        k.above = (float)(shift + step), k.below = (float)(shift - step);
    }
    return k;
}

/* ---- the k largest ---- */

struct top top_empty(float *values, int64_t *places, int k) {
    for (int i = 0; i < k; i++) values[i] = -1, places[i] = 0;
    return (struct top){values, places, k};
}

void top_insert(struct top *top, float value, int64_t place) {
    float *values = top->values;
    int64_t *places = top->places;
    int i = top->k;
    while (i > 0 && (values[i - 1] < value || (values[i - 1] == value && places[i - 1] > place))) {
        i--;
        if (i + 1 < top->k) values[i + 1] = values[i], places[i + 1] = places[i];
    }
    if (i < top->k) values[i] = value, places[i] = place;
}
