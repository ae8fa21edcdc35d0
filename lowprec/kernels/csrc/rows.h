/* Loops over rows, for one element type; part of norm_body.h.
 *
 * One task is one block of rows, all channels at once; a pass ends before the next begins. Four rows at a time share
 * what is loaded per channel.
 */
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
