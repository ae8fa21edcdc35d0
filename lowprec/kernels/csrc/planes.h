/* Loops over planes, for one element type; part of norm_body.h.
 *
 * One task is a few neighbouring channels, whose slab of samples x length elements comes from memory once and from the
 * cache in the later passes.
 */
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
    for (int c = 0; c < count; c++) finish_mean(f, start + c, ones[c], sums_total(&sums[c], 0, 3));
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
        for (int c = 0; c < count; c++) finish_l1(f, start + c, sums_total(&sums[c], 0, 3));
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
                sums_took(&sums[c], end - from);
            }
        }
    struct coefficients k[GROUP];
    for (int c = 0; c < count; c++) {
        const double sum = sums_total(&sums[c], 0, 1), moment = sums_total(&sums[c], 2, 3);
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
