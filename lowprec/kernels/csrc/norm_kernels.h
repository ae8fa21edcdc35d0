/* What the loops of one instruction set share, and the three element types. Included after its vector_*.h. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    RUN = 4096, /* elements summed in float32 before they go into a double: 64 to 128 a lane */
    MOST = 64,  /* largest k */
    BLOCK_BYTES = 131072,
    PART = 32, /* rows whose extremes are kept, to find the largest deviations in them later */
    GROUP = 8, /* most channels in a task */
    SLAB_BYTES = 400000,
    PREFETCH_BYTES = 2048, /* planes: at least this far into the next piece */
    AHEAD = 4096,          /* rows: into the next page, which no processor prefetches by itself */
};

#define INLINE static inline __attribute__((always_inline))
#ifndef CASE
#define CASE INLINE
#endif

INLINE M tail(int n) { return n == LANES ? (M)0xffff : first(n); }

static inline void put_bits(uint8_t *to, M m, int n) {
    const uint16_t bits = (uint16_t)(m & tail(n));
    memcpy(to, &bits, n > 8 ? 2 : 1); /* little endian */
}
static inline M get_bits(const uint8_t *from, int n) {
    uint16_t m = 0;
    memcpy(&m, from, n > 8 ? 2 : 1);
    return (M)m;
}
static inline float weight_of(const float *weight, int64_t c) { return weight ? weight[c] : 1; }

/* Sums in four times sixteen float32 lanes, which are emptied into doubles. */
struct sums {
    V part[4];
    double whole[4][LANES];
    int64_t taken;
};
INLINE void sums_flush(struct sums *s) {
    float part[LANES];
    for (int j = 0; j < 4; j++) {
        store_f32(part, s->part[j], LANES);
        for (int i = 0; i < LANES; i++) s->whole[j][i] += part[i];
        s->part[j] = set1(0);
    }
    s->taken = 0;
}
INLINE void sums_took(struct sums *s, int64_t elements) {
    s->taken += elements;
    if (s->taken >= RUN) sums_flush(s);
}
INLINE double sums_total(struct sums *s, int first_part, int last_part) {
    double total = 0;
    sums_flush(s);
    for (int j = first_part; j <= last_part; j++)
        for (int i = 0; i < LANES; i++) total += s->whole[j][i];
    return total;
}

/* Fetches what lies `bytes` further on. What is read for the last time (a constant) leaves no copy in the outer caches,
 * where it would drive out what is read again. */
#define PREFETCH(address, bytes, last) \
    do { \
        if (last) __builtin_prefetch((const char *)(address) + (bytes), 0, 0); \
        else __builtin_prefetch((const char *)(address) + (bytes)); \
    } while (0)

/* Runs a block for every vector from 0 to length, with n elements in it: a constant but for the last. */
#define VECTORS(i, length, ...) \
    do { \
        int64_t i = 0; \
        for (; i + LANES <= (length); i += LANES) { \
            enum { n = LANES }; \
            __VA_ARGS__ \
        } \
        if (i < (length)) { \
            const int n = (int)((length)-i); \
            __VA_ARGS__ \
        } \
    } while (0)

/* What a backward must do: constants where a loop is made for one case. */
struct how {
    int l1, from_output, relu, residual;
};
INLINE struct how how_of(const struct backward *b) {
    return (struct how){!b->shape.k, b->from_output, b->relu, b->dresidual != NULL};
}

/* Planes: neighbouring channels are worked on together, so that what is read in one piece fills pages of memory. */
struct plane_pass {
    const struct forward *f;
    const struct backward *b;
    M *masks; /* which gradients the ReLU lets through, per thread */
    int64_t group; /* channels in a task */
    int64_t ahead; /* samples from what is read to what is prefetched */
};
static struct plane_pass plane_pass_of(const struct shape *s, size_t element) {
    const int64_t piece = s->length * (int64_t)element, slab = s->samples * piece;
    int64_t group = SLAB_BYTES / slab, fair = s->channels / (4 * s->threads);
    group = group > GROUP ? GROUP : group;
    group = group > fair ? fair : group;
    group = group < 1 ? 1 : group;
    return (struct plane_pass){.group = group, .ahead = 1 + PREFETCH_BYTES / (group * piece)};
}
static int64_t tasks(const struct plane_pass *p, int64_t channels) { return (channels + p->group - 1) / p->group; }

/* One pass over rows. Whole-tensor passes end where the next begins, so everything per channel stands here. */
struct row_pass {
    const struct shape *shape;
    const struct forward *f;
    const struct backward *b;
    int64_t block, blocks; /* rows in a block; how many blocks */
    int absolute;
    const float *center;
    float *sums, *largest, *smallest; /* per block, or per part of PART rows, and channel */
    float *factor, *bias, *above, *below, *spike;
    M *masks;
};
static inline int64_t block_end(const struct row_pass *p, int64_t block) {
    int64_t end = (block + 1) * p->block;
    return end < p->shape->samples ? end : p->shape->samples;
}
static struct row_pass row_pass_of(const struct shape *s, size_t element) {
    int64_t rows = BLOCK_BYTES / (s->channels * (int64_t)element);
    rows = rows < PART ? PART : rows > 512 ? 512 : rows / PART * PART;
    return (struct row_pass){.shape = s, .block = rows, .blocks = (s->samples + rows - 1) / rows};
}
/* The column sums of a blocks x width table, in double; NULL when there is no memory. */
static double *column_sums(const float *table, int64_t blocks, int64_t width) {
    double *total = calloc((size_t)width, sizeof *total);
    for (int64_t b = 0; total && b < blocks; b++)
        for (int64_t i = 0; i < width; i++) total[i] += table[b * width + i];
    return total;
}

typedef float (*value_fn)(const void *, int64_t);

/* Marks the extremes that lie below the mean. */
static void sign_extremes(const struct forward *f, int64_t c, value_fn value) {
    const struct shape *s = &f->shape;
    for (int64_t *place = f->extremes + c * s->k; place < f->extremes + (c + 1) * s->k; place++) {
        int64_t at = (*place / s->length * s->channels + c) * s->length + *place % s->length;
        if (value(f->x, at) < f->mean[c]) *place = ~*place;
    }
}

static int forward_rows(const struct forward *f, size_t element, value_fn value, task_fn sum_rows, task_fn top_rows,
                        task_fn apply_rows) {
    const int64_t channels = f->shape.channels;
    const int threads = f->shape.threads, k = f->shape.k;
    struct row_pass p = row_pass_of(&f->shape, element);
    const int64_t parts = k ? p.blocks * (p.block / PART) : 0;
    float *memory = malloc((size_t)((p.blocks + 2 * parts + 3) * channels) * sizeof *memory);
    if (!memory) return -1;
    float *ones = memory + (p.blocks + 2 * parts) * channels;
    p.f = f, p.sums = memory, p.factor = ones + channels, p.bias = p.factor + channels, p.center = ones;
    p.largest = memory + p.blocks * channels, p.smallest = p.largest + parts * channels;
    for (int64_t c = 0; c < channels; c++) ones[c] = value(f->x, c);
    run_parallel(sum_rows, &p, p.blocks, threads);
    double *total = column_sums(p.sums, p.blocks, channels);
    for (int64_t c = 0; c < channels && total; c++) finish_mean(f, c, ones[c], total[c]);
    p.center = f->mean, p.absolute = 1;
    if (total && k) {
        run_parallel(top_rows, &p, (channels + LANES - 1) / LANES, threads);
    } else if (total) {
        run_parallel(sum_rows, &p, p.blocks, threads);
        free(total);
        total = column_sums(p.sums, p.blocks, channels);
        for (int64_t c = 0; c < channels && total; c++) finish_l1(f, c, total[c]);
    }
    for (int64_t c = 0; c < channels && total; c++) {
        p.factor[c] = weight_of(f->weight, c) / f->scale[c];
        p.bias[c] = f->bias ? f->bias[c] : 0;
    }
    if (total) run_parallel(apply_rows, &p, p.blocks, threads);
    const int failed = !total;
    free(memory), free(total);
    return failed ? -1 : 0;
}

static int backward_rows(const struct backward *b, size_t element, task_fn moment_rows, task_fn dx_rows,
                         void (*spike_rows)(const struct row_pass *)) {
    const int64_t channels = b->shape.channels, vectors = (channels + LANES - 1) / LANES;
    struct row_pass p = row_pass_of(&b->shape, element);
    float *memory = malloc((size_t)((3 * p.blocks + 4) * channels) * sizeof *memory);
    M *masks = b->relu ? malloc((size_t)(b->shape.samples * vectors) * sizeof *masks) : NULL;
    int failed = !memory || (b->relu && !masks);
    if (!failed) {
        p.b = b, p.sums = memory, p.masks = masks;
        p.factor = memory + 3 * p.blocks * channels, p.above = p.factor + channels, p.below = p.above + channels;
        p.spike = p.below + channels;
        run_parallel(moment_rows, &p, p.blocks, b->shape.threads);
        double *sum = column_sums(p.sums, p.blocks, 3 * channels), *moment = sum + channels, *positive = moment + channels;
        for (int64_t c = 0; c < channels && sum; c++) {
            struct coefficients k = finish_backward(b, c, sum[c], moment[c], positive[c]);
            p.factor[c] = k.factor, p.above[c] = k.above, p.below[c] = k.below, p.spike[c] = k.spike;
        }
        failed = !sum;
        free(sum);
    }
    if (!failed) {
        run_parallel(dx_rows, &p, p.blocks, b->shape.threads);
        spike_rows(&p);
    }
    free(memory), free(masks);
    return failed ? -1 : 0;
}

static int forward_planes(const struct forward *f, size_t element, task_fn planes) {
    struct plane_pass p = plane_pass_of(&f->shape, element);
    p.f = f;
    run_parallel(planes, &p, tasks(&p, f->shape.channels), f->shape.threads);
    return 0;
}

static int backward_planes(const struct backward *b, size_t element, task_fn planes) {
    struct plane_pass p = plane_pass_of(&b->shape, element);
    const int64_t vectors = (b->shape.length + LANES - 1) / LANES;
    p.b = b;
    if (b->relu) {
        p.masks = malloc((size_t)(b->shape.threads * p.group * b->shape.samples * vectors) * sizeof *p.masks);
        if (!p.masks) return -1;
    }
    run_parallel(planes, &p, tasks(&p, b->shape.channels), b->shape.threads);
    free(p.masks);
    return 0;
}

#define ELEMENT f32
#define T float
#include "norm_body.h"
#define ELEMENT f16
#define T uint16_t
#include "norm_body.h"
#define ELEMENT bf16
#define T uint16_t
#include "norm_body.h"

#define KERNELS {{forward_f32, backward_f32}, {forward_f16, backward_f16}, {forward_bf16, backward_bf16}}
