/* The loops for one element type; included three times by each instruction set with ELEMENT (f32, f16, bf16) and T.
 *
 * planes: one task is a few channels, whose slab of samples x length elements comes from memory once and from the cache
 * in the later passes. rows: one task is one block of rows, all channels at once; a pass ends before the next begins.
 * Passes alternate in direction, so that each begins with what the one before it touched last. Sums are float32 over at
 * most a few thousand elements a lane and double from there; their order does not depend on the number of threads.
 *
 * What a loop must do (a ReLU? which bits?) is a constant in the commonest cases: `_as` functions are inlined into one
 * task per case, but for plain C, where they are compiled once.
 */
#define JOIN2(a, b) a##_##b
#define JOIN(a, b) JOIN2(a, b)
#define NAME(name) JOIN(name, ELEMENT)
#define LOAD JOIN(load, ELEMENT)
#define STORE JOIN(store, ELEMENT)
#define STREAM JOIN(stream, ELEMENT)
#define ROUNDED JOIN(rounded, ELEMENT)

static inline float NAME(value_at)(const void *x, int64_t i) { return JOIN(one, ELEMENT)((const T *)x + i); }

INLINE void NAME(put)(T *p, V v, int n, int stream) {
    if (stream && n == LANES) STREAM(p, v);
    else STORE(p, v, n);
}

/* ---- the arithmetic of one vector ---- */

/* y, and its bit: returns the vector of y and writes the bits to `bits`. */
INLINE V NAME(apply)(V x, V mean, V factor, V bias, const T *residual, uint8_t *bits, int n, int relu, int kind) {
    V d = sub(x, mean), y = fma_(d, factor, bias);
    if (residual) y = add(y, LOAD(residual, n));
    if (relu) y = rectified(y);
    if (kind == BITS_SIGN) put_bits(bits, at_least(d, set1(0)), n);
    if (kind == BITS_ACTIVE) put_bits(bits, active(ROUNDED(y)), n);
    return y;
}

/* The gradient, where the ReLU lets it through, what it is multiplied with (z or d), and the signs of d. */
struct NAME(moment) {
    V g, z;
    M on, sign;
};
INLINE struct NAME(moment) NAME(moment)(const T *grad, const T *kept, const uint8_t *bits, V mean, int n, struct how how) {
    struct NAME(moment) m = {LOAD(grad, n), LOAD(kept, n), tail(n), 0};
    if (how.from_output) {
        m.on &= active(m.z);
        if (how.l1) m.sign = get_bits(bits, n);
    } else {
        m.z = sub(m.z, mean);
        if (how.l1) m.sign = at_least(m.z, set1(0)) & tail(n);
        if (how.relu) m.on = get_bits(bits, n);
    }
    return m;
}

INLINE V NAME(dx)(V g, const T *kept, const uint8_t *bits, V mean, V factor, V above_, V below, int n, struct how how) {
    if (!how.l1) return fma_(g, factor, above_);
    M sign = how.from_output ? get_bits(bits, n) : at_least(LOAD(kept, n), mean);
    return fma_(g, factor, pick(sign, above_, below));
}

/* ---- planes ---- */

/* The sum of x - center, or of absolute values, over one row of a slab. */
INLINE void NAME(sum_row)(struct sums *s, const T *x, int64_t length, V center, int absolute, int64_t ahead) {
    for (int64_t from = 0; from < length; from += RUN) {
        int64_t i = from, end = from + RUN < length ? from + RUN : length;
        V p0 = s->part[0], p1 = s->part[1], p2 = s->part[2], p3 = s->part[3];
        for (; i + 4 * LANES <= end; i += 4 * LANES) {
            if (!absolute)
                for (int line = 0; line < 4 * LANES * (int)sizeof(T); line += 64) __builtin_prefetch((const char *)(x + ahead + i) + line);
            V d0 = sub(LOAD(x + i, LANES), center), d1 = sub(LOAD(x + i + LANES, LANES), center);
            V d2 = sub(LOAD(x + i + 2 * LANES, LANES), center), d3 = sub(LOAD(x + i + 3 * LANES, LANES), center);
            p0 = add(p0, absolute ? magnitude(d0) : d0), p1 = add(p1, absolute ? magnitude(d1) : d1);
            p2 = add(p2, absolute ? magnitude(d2) : d2), p3 = add(p3, absolute ? magnitude(d3) : d3);
        }
        VECTORS(j, end - i, {
            V d = keep(tail(n), sub(LOAD(x + i + j, n), center));
            p0 = add(p0, absolute ? magnitude(d) : d);
        });
        s->part[0] = p0, s->part[1] = p1, s->part[2] = p2, s->part[3] = p3;
        sums_took(s, end - from);
    }
}

INLINE void NAME(top_row)(struct top *top, const T *x, int64_t length, V center, int64_t place) {
    V least = set1(top->values[top->k - 1]);
    VECTORS(i, length, {
        V size = magnitude(sub(LOAD(x + i, n), center));
        M larger = above(size, least) & tail(n);
        if (larger) {
            float values[LANES];
            store_f32(values, size, LANES);
            for (int j = 0; j < n; j++)
                if (larger >> j & 1) top_insert(top, values[j], place + i + j);
            least = set1(top->values[top->k - 1]);
        }
    });
}

CASE void NAME(forward_planes_as)(const struct plane_pass *p, int64_t task, int relu, int kind, int has_residual) {
    const struct forward *f = p->f;
    const struct shape *s = &f->shape;
    const int64_t rows = s->samples, length = s->length, step = s->channels * length, bytes = (length + 7) / 8;
    const int64_t ahead = p->ahead * step, start = task * p->group;
    const int stream = s->stream, count = (int)(s->channels - start < p->group ? s->channels - start : p->group);
    const T *x = (const T *)f->x + start * length;
    struct sums sums[GROUP] = {0};
    float ones[GROUP];
    for (int c = 0; c < count; c++) ones[c] = NAME(value_at)(x, c * length);
    for (int64_t r = rows - 1; r >= 0; r--)
        for (int c = 0; c < count; c++)
            NAME(sum_row)(&sums[c], x + r * step + c * length, length, set1(ones[c]), 0, -ahead);
    for (int c = 0; c < count; c++) finish_mean(f, start + c, ones[c], sums_total(&sums[c]));
    if (s->k) {
        for (int c = 0; c < count; c++) {
            float values[MOST];
            int64_t places[MOST];
            struct top top = top_empty(values, places, s->k);
            const V mean = set1(f->mean[start + c]);
            for (int64_t r = 0; r < rows; r++) NAME(top_row)(&top, x + r * step + c * length, length, mean, r * length);
            finish_top(f, start + c, &top);
            sign_extremes(f, start + c, NAME(value_at));
        }
    } else {
        memset(sums, 0, sizeof sums);
        for (int64_t r = 0; r < rows; r++)
            for (int c = 0; c < count; c++)
                NAME(sum_row)(&sums[c], x + r * step + c * length, length, set1(f->mean[start + c]), 1, 0);
        for (int c = 0; c < count; c++) finish_l1(f, start + c, sums_total(&sums[c]));
    }
    for (int64_t r = rows - 1; r >= 0; r--)
        for (int c = 0; c < count; c++) {
            const int64_t at = (start + c) * length + r * step;
            const T *row = (const T *)f->x + at, *residual = (const T *)f->residual + (has_residual ? at : 0);
            T *y = (T *)f->y + at;
            uint8_t *bits = f->bits + (r * s->channels + start + c) * bytes;
            const V mean = set1(f->mean[start + c]), bias = set1(f->bias ? f->bias[start + c] : 0);
            const V factor = set1(weight_of(f->weight, start + c) / f->scale[start + c]);
            VECTORS(i, length, {
                if (!stream) __builtin_prefetch(y - ahead + i, 1);
                V v = NAME(apply)(LOAD(row + i, n), mean, factor, bias, has_residual ? residual + i : NULL, bits + i / 8, n, relu, kind);
                NAME(put)(y + i, v, n, stream);
            });
        }
}

static void NAME(forward_planes)(const void *context, int64_t task, int worker) {
    (void)worker;
    const struct plane_pass *p = context;
    const struct forward *f = p->f;
    if (f->relu && !f->residual && f->bits_kind == BITS_SIGN) NAME(forward_planes_as)(p, task, 1, BITS_SIGN, 0);
    else if (f->relu && !f->residual && f->bits_kind == BITS_NONE) NAME(forward_planes_as)(p, task, 1, BITS_NONE, 0);
    else if (f->relu && f->residual) NAME(forward_planes_as)(p, task, 1, BITS_ACTIVE, 1);
    else NAME(forward_planes_as)(p, task, f->relu, f->bits_kind, f->residual != NULL);
}

CASE void NAME(backward_planes_as)(const struct plane_pass *p, int64_t task, int worker, struct how how) {
    const struct backward *b = p->b;
    const struct shape *s = &b->shape;
    const int64_t rows = s->samples, length = s->length, step = s->channels * length, bytes = (length + 7) / 8;
    const int64_t vectors = (length + LANES - 1) / LANES, ahead = p->ahead * step, start = task * p->group;
    const int stream = s->stream, count = (int)(s->channels - start < p->group ? s->channels - start : p->group);
    M *masks = p->masks + (how.relu ? worker * p->group * rows * vectors : 0);
    struct sums sums[GROUP] = {0}; /* parts 0, 1: of g; 2, 3: of g * z */
    int64_t positive[GROUP] = {0};
    for (int64_t r = 0; r < rows; r++)
        for (int c = 0; c < count; c++) {
            const uint8_t *bits = b->bits + (r * s->channels + start + c) * bytes;
            const V mean = set1(b->mean[start + c]);
            for (int64_t from = 0; from < length; from += RUN) {
                const int64_t end = from + RUN < length ? from + RUN : length, at = (start + c) * length + r * step + from;
                const T *g = (const T *)b->grad_y + at, *z = (const T *)b->kept + at;
                M *on = masks + (how.relu ? (r * count + c) * vectors + from / LANES : 0);
                V total = sums[c].part[0], total2 = sums[c].part[1], product = sums[c].part[2], product2 = sums[c].part[3];
                int64_t signs = 0;
                VECTORS(i, end - from, {
                    PREFETCH(g + i, ahead * (int64_t)sizeof(T), 0);
                    PREFETCH(z + i, ahead * (int64_t)sizeof(T), how.from_output);
                    struct NAME(moment) m = NAME(moment)(g + i, z + i, bits + (from + i) / 8, mean, n, how);
                    if (how.relu) on[i / LANES] = m.on;
                    if (how.l1) signs += __builtin_popcount(m.sign);
                    V swap = total2; /* two sums of each kind take turns, to hide the latency of an addition */
                    total2 = add_if(total, m.on, m.g), total = swap;
                    swap = product2, product2 = fma_if(m.g, m.z, product, m.on), product = swap;
                });
                sums[c].part[0] = total, sums[c].part[1] = total2, sums[c].part[2] = product, sums[c].part[3] = product2;
                positive[c] += signs;
                sums_took2(&sums[c], end - from);
            }
        }
    struct coefficients k[GROUP];
    for (int c = 0; c < count; c++) {
        double sum = 0, moment = 0;
        sums_totals2(&sums[c], &sum, &moment);
        k[c] = finish_backward(b, start + c, sum, moment, (double)positive[c]);
    }
    for (int64_t r = rows - 1; r >= 0; r--)
        for (int c = 0; c < count; c++) {
            const int64_t at = (start + c) * length + r * step;
            const T *g = (const T *)b->grad_y + at, *kept = (const T *)b->kept + at;
            T *dx = (T *)b->dx + at, *dresidual = (T *)b->dresidual + (how.residual ? at : 0);
            const uint8_t *bits = b->bits + (r * s->channels + start + c) * bytes;
            const M *on = masks + (how.relu ? (r * count + c) * vectors : 0);
            const V mean = set1(b->mean[start + c]), factor = set1(k[c].factor), above_ = set1(k[c].above), below = set1(k[c].below);
            VECTORS(i, length, {
                if (!stream) __builtin_prefetch(dx - ahead + i, 1);
                V v = LOAD(g + i, n);
                if (how.relu) v = keep(on[i / LANES], v);
                if (how.residual) NAME(put)(dresidual + i, v, n, stream);
                NAME(put)(dx + i, NAME(dx)(v, kept + i, bits + i / 8, mean, factor, above_, below, n, how), n, stream);
            });
        }
    for (int c = 0; c < count; c++)
        for (int j = 0; j < s->k; j++) {
            int64_t place = b->extremes[(start + c) * s->k + j], where = place < 0 ? ~place : place;
            int64_t r = where / length, i = where % length, at = (start + c) * length + r * step + i;
            int on = !how.relu || (masks[(r * count + c) * vectors + i / LANES] >> (i % LANES) & 1);
            float g = on ? NAME(value_at)(b->grad_y, at) : 0, spike = place < 0 ? -k[c].spike : k[c].spike;
            STORE((T *)b->dx + at, set1(g * k[c].factor + k[c].above + spike), 1);
        }
}

static void NAME(backward_planes)(const void *context, int64_t task, int worker) {
    const struct plane_pass *p = context;
    const struct how how = how_of(p->b);
    if (how.from_output && how.l1) NAME(backward_planes_as)(p, task, worker, (struct how){1, 1, 1, 0});
    else if (how.from_output) NAME(backward_planes_as)(p, task, worker, (struct how){0, 1, 1, 0});
    else if (how.l1 && how.relu) NAME(backward_planes_as)(p, task, worker, (struct how){1, 0, 1, how.residual});
    else NAME(backward_planes_as)(p, task, worker, how);
}

/* ---- rows ---- */

CASE void NAME(sum_rows_as)(const struct row_pass *p, float *sums, int64_t r, const int count, int absolute) {
    const int64_t channels = p->shape->channels;
    const T *x = (const T *)p->f->x + r * channels;
    VECTORS(c, channels, {
        V center = load_f32(p->center + c, n);
        V total = load_f32(sums + c, n);
        for (int i = 0; i < count; i++) {
            PREFETCH(x + i * channels + c, AHEAD, 0);
            V d = sub(LOAD(x + i * channels + c, n), center);
            total = add(total, absolute ? magnitude(d) : d);
        }
        store_f32(sums + c, total, n);
    });
}

/* The same of x - center, and the extremes of x over the part that these rows are in. */
CASE void NAME(sum_and_extremes)(const struct row_pass *p, float *sums, int64_t r, const int count) {
    const int64_t channels = p->shape->channels, part = r / PART * channels;
    const T *x = (const T *)p->f->x + r * channels;
    VECTORS(c, channels, {
        V center = load_f32(p->center + c, n);
        V total = load_f32(sums + c, n);
        V high = r % PART ? load_f32(p->largest + part + c, n) : LOAD(x + c, n);
        V low = r % PART ? load_f32(p->smallest + part + c, n) : high;
        for (int i = 0; i < count; i++) {
            PREFETCH(x + i * channels + c, AHEAD, 0);
            V v = LOAD(x + i * channels + c, n);
            total = add(total, sub(v, center));
            high = larger(v, high), low = smaller(v, low);
        }
        store_f32(sums + c, total, n);
        store_f32(p->largest + part + c, high, n);
        store_f32(p->smallest + part + c, low, n);
    });
}

static void NAME(sum_rows)(const void *context, int64_t index, int worker) {
    (void)worker;
    const struct row_pass *p = context;
    const int64_t block = p->absolute ? index : p->blocks - 1 - index, end = block_end(p, block);
    float *sums = p->sums + block * p->shape->channels;
    memset(sums, 0, sizeof(float) * (size_t)p->shape->channels);
    int64_t r = block * p->block;
    if (p->shape->k) {
        for (; r + 4 <= end; r += 4) NAME(sum_and_extremes)(p, sums, r, 4);
        for (; r < end; r++) NAME(sum_and_extremes)(p, sums, r, 1);
    }
    for (; r + 4 <= end; r += 4)
        if (p->absolute) NAME(sum_rows_as)(p, sums, r, 4, 1);
        else NAME(sum_rows_as)(p, sums, r, 4, 0);
    for (; r < end; r++) NAME(sum_rows_as)(p, sums, r, 1, p->absolute);
}

/* The k largest deviations of sixteen channels: they lie in the k parts whose own largest deviations come first. */
static void NAME(top_rows)(const void *context, int64_t index, int worker) {
    (void)worker;
    const struct row_pass *p = context;
    const int64_t channels = p->shape->channels, rows = p->shape->samples, parts = (rows + PART - 1) / PART, from = index * LANES;
    const int k = p->shape->k, n = (int)(channels - from < LANES ? channels - from : LANES);
    const V mean = load_f32(p->center + from, n);
    float values[LANES][MOST], least[LANES];
    int64_t places[LANES][MOST];
    struct top tops[LANES];
    for (int j = 0; j < LANES; j++) tops[j] = top_empty(values[j], places[j], k), least[j] = -1;
    for (int64_t part = 0; part < parts; part++) {
        V high = sub(load_f32(p->largest + part * channels + from, n), mean);
        V low = sub(load_f32(p->smallest + part * channels + from, n), mean);
        V size = larger(magnitude(high), magnitude(low));
        M more = above(size, load_f32(least, LANES)) & tail(n);
        if (!more) continue;
        float sizes[LANES];
        store_f32(sizes, size, LANES);
        for (int j = 0; j < n; j++)
            if (more >> j & 1) top_insert(&tops[j], sizes[j], part), least[j] = values[j][k - 1];
    }
    for (int j = 0; j < n; j++) {
        const int64_t c = from + j;
        const float mean_c = p->f->mean[c], floor_c = values[j][k - 1]; /* there are k deviations at least as large */
        float found[MOST];
        int64_t at[MOST];
        struct top top = top_empty(found, at, k);
        for (int i = 0; i < k && values[j][i] >= 0; i++)
            for (int64_t r = places[j][i] * PART, end = r + PART < rows ? r + PART : rows; r < end; r++) {
                float size = fabsf(NAME(value_at)(p->f->x, r * channels + c) - mean_c);
                if (size >= floor_c && size >= found[k - 1]) top_insert(&top, size, r);
            }
        finish_top(p->f, c, &top);
        sign_extremes(p->f, c, NAME(value_at));
    }
}

CASE void NAME(apply_rows_as)(const struct row_pass *p, int64_t r, const int count, int relu, int kind, int has_residual) {
    const struct forward *f = p->f;
    const int64_t channels = p->shape->channels, bytes = (channels + 7) / 8;
    const int stream = p->shape->stream;
    const T *x = (const T *)f->x + r * channels, *residual = (const T *)f->residual + (has_residual ? r * channels : 0);
    T *y = (T *)f->y + r * channels;
    uint8_t *bits = f->bits + r * bytes;
    VECTORS(c, channels, {
        V mean = load_f32(f->mean + c, n);
        V factor = load_f32(p->factor + c, n);
        V bias = load_f32(p->bias + c, n);
        for (int i = 0; i < count; i++) {
            const int64_t at = i * channels + c;
            PREFETCH(x + at, AHEAD, 1);
            if (!stream) __builtin_prefetch((const char *)(y + at) + AHEAD, 1);
            V v = NAME(apply)(LOAD(x + at, n), mean, factor, bias, has_residual ? residual + at : NULL, bits + i * bytes + c / 8,
                              n, relu, kind);
            NAME(put)(y + at, v, n, stream);
        }
    });
}

/* Four rows at a time share what is loaded per channel. */
CASE void NAME(apply_block_as)(const struct row_pass *p, int64_t block, int relu, int kind, int has_residual) {
    int64_t r = block * p->block, end = block_end(p, block);
    for (; r + 4 <= end; r += 4) NAME(apply_rows_as)(p, r, 4, relu, kind, has_residual);
    for (; r < end; r++) NAME(apply_rows_as)(p, r, 1, relu, kind, has_residual);
}

static void NAME(apply_rows)(const void *context, int64_t index, int worker) {
    (void)worker;
    const struct row_pass *p = context;
    const struct forward *f = p->f;
    const int64_t block = p->blocks - 1 - index;
    if (f->relu && !f->residual && f->bits_kind == BITS_SIGN) NAME(apply_block_as)(p, block, 1, BITS_SIGN, 0);
    else if (f->relu && !f->residual && f->bits_kind == BITS_NONE) NAME(apply_block_as)(p, block, 1, BITS_NONE, 0);
    else if (f->relu && f->residual) NAME(apply_block_as)(p, block, 1, BITS_ACTIVE, 1);
    else NAME(apply_block_as)(p, block, f->relu, f->bits_kind, f->residual != NULL);
}

CASE void NAME(moment_rows_as)(const struct row_pass *p, float *sums, int64_t r, const int count, struct how how) {
    const struct backward *b = p->b;
    const int64_t channels = p->shape->channels, bytes = (channels + 7) / 8, vectors = (channels + LANES - 1) / LANES;
    float *moments = sums + channels, *positive = moments + channels;
    const T *grad = (const T *)b->grad_y + r * channels, *kept = (const T *)b->kept + r * channels;
    VECTORS(c, channels, {
        V total = load_f32(sums + c, n);
        V product = load_f32(moments + c, n);
        V signs = how.l1 ? load_f32(positive + c, n) : set1(0);
        V mean = how.from_output ? set1(0) : load_f32(b->mean + c, n);
        for (int i = 0; i < count; i++) {
            const uint8_t *bits = b->bits + (r + i) * bytes + c / 8;
            PREFETCH(grad + i * channels + c, AHEAD, 0);
            PREFETCH(kept + i * channels + c, AHEAD, how.from_output);
            struct NAME(moment) m = NAME(moment)(grad + i * channels + c, kept + i * channels + c, bits, mean, n, how);
            if (how.relu) p->masks[(r + i) * vectors + c / LANES] = m.on;
            total = add_if(total, m.on, m.g);
            product = fma_if(m.g, m.z, product, m.on);
            if (how.l1) signs = add_if(signs, m.sign, set1(1));
        }
        store_f32(sums + c, total, n);
        store_f32(moments + c, product, n);
        if (how.l1) store_f32(positive + c, signs, n);
    });
}

static void NAME(moment_rows)(const void *context, int64_t block, int worker) {
    (void)worker;
    const struct row_pass *p = context;
    const struct how how = how_of(p->b);
    const int64_t end = block_end(p, block);
    float *sums = p->sums + 3 * block * p->shape->channels;
    memset(sums, 0, sizeof(float) * 3 * (size_t)p->shape->channels);
    int64_t r = block * p->block;
    for (; r + 4 <= end; r += 4)
        if (how.from_output && how.l1) NAME(moment_rows_as)(p, sums, r, 4, (struct how){1, 1, 1, 0});
        else if (how.from_output) NAME(moment_rows_as)(p, sums, r, 4, (struct how){0, 1, 1, 0});
        else NAME(moment_rows_as)(p, sums, r, 4, how);
    for (; r < end; r++) NAME(moment_rows_as)(p, sums, r, 1, how);
}

CASE void NAME(dx_rows_as)(const struct row_pass *p, int64_t r, const int count, struct how how) {
    const struct backward *b = p->b;
    const int64_t channels = p->shape->channels, bytes = (channels + 7) / 8, vectors = (channels + LANES - 1) / LANES;
    const int stream = p->shape->stream;
    const T *grad = (const T *)b->grad_y + r * channels, *kept = (const T *)b->kept + r * channels;
    T *dx = (T *)b->dx + r * channels, *dresidual = (T *)b->dresidual + (how.residual ? r * channels : 0);
    VECTORS(c, channels, {
        V mean = how.from_output ? set1(0) : load_f32(b->mean + c, n);
        V factor = load_f32(p->factor + c, n);
        V above_ = load_f32(p->above + c, n);
        V below = how.l1 ? load_f32(p->below + c, n) : set1(0);
        for (int i = 0; i < count; i++) {
            const int64_t at = i * channels + c;
            const uint8_t *bits = b->bits + (r + i) * bytes + c / 8;
            PREFETCH(grad + at, AHEAD, 1);
            if (!stream) __builtin_prefetch((const char *)(dx + at) + AHEAD, 1);
            V g = LOAD(grad + at, n);
            if (how.relu) g = keep(p->masks[(r + i) * vectors + c / LANES], g);
            if (how.residual) NAME(put)(dresidual + at, g, n, stream);
            NAME(put)(dx + at, NAME(dx)(g, kept + at, bits, mean, factor, above_, below, n, how), n, stream);
        }
    });
}

CASE void NAME(dx_block_as)(const struct row_pass *p, int64_t block, struct how how) {
    int64_t r = block * p->block, end = block_end(p, block);
    for (; r + 4 <= end; r += 4) NAME(dx_rows_as)(p, r, 4, how);
    for (; r < end; r++) NAME(dx_rows_as)(p, r, 1, how);
}

static void NAME(dx_rows)(const void *context, int64_t index, int worker) {
    (void)worker;
    const struct row_pass *p = context;
    const struct how how = how_of(p->b);
    if (how.from_output && how.l1) NAME(dx_block_as)(p, p->blocks - 1 - index, (struct how){1, 1, 1, 0});
    else if (how.from_output) NAME(dx_block_as)(p, p->blocks - 1 - index, (struct how){0, 1, 1, 0});
    else if (how.l1 && how.relu) NAME(dx_block_as)(p, p->blocks - 1 - index, (struct how){1, 0, 1, how.residual});
    else NAME(dx_block_as)(p, p->blocks - 1 - index, how);
}

static void NAME(spike_rows)(const struct row_pass *p) {
    const struct backward *b = p->b;
    const int64_t channels = p->shape->channels, vectors = (channels + LANES - 1) / LANES;
    for (int64_t c = 0; c < channels; c++)
        for (int j = 0; j < p->shape->k; j++) {
            int64_t place = b->extremes[c * p->shape->k + j], r = place < 0 ? ~place : place;
            int on = !b->relu || (p->masks[r * vectors + c / LANES] >> (c % LANES) & 1);
            float g = on ? NAME(value_at)(b->grad_y, r * channels + c) : 0, spike = place < 0 ? -p->spike[c] : p->spike[c];
            STORE((T *)b->dx + r * channels + c, set1(g * p->factor[c] + p->above[c] + spike), 1);
        }
}

static int NAME(forward)(const struct forward *f) {
    if (f->shape.rows)
        return forward_rows(f, sizeof(T), NAME(value_at), NAME(sum_rows), NAME(top_rows), NAME(apply_rows));
    return forward_planes(f, sizeof(T), NAME(forward_planes));
}

static int NAME(backward)(const struct backward *b) {
    if (b->shape.rows) return backward_rows(b, sizeof(T), NAME(moment_rows), NAME(dx_rows), NAME(spike_rows));
    return backward_planes(b, sizeof(T), NAME(backward_planes));
}

#undef JOIN2
#undef JOIN
#undef NAME
#undef LOAD
#undef STORE
#undef STREAM
#undef ROUNDED
#undef ELEMENT
#undef T
