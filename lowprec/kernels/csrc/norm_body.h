/* The loops for one element type; included three times by each instruction set with ELEMENT (f32, f16, bf16) and T.
 *
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

#include "planes.h"
#include "rows.h"

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
