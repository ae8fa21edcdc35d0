/* Sixteen floats in plain C, for every other processor; the compiler vectorises. Names: see vector_avx512.h. */
#include <math.h>
#include <string.h>

typedef struct { float at[LANES]; } V;
typedef uint16_t M;

#define EACH(expression) \
    V r; \
    for (int i = 0; i < LANES; i++) r.at[i] = (expression); \
    return r
#define BITS(condition) \
    unsigned r = 0; \
    for (int i = 0; i < LANES; i++) r |= (unsigned)(condition) << i; \
    return (M)r

static inline V set1(float a) { EACH(a); }
static inline V add(V a, V b) { EACH(a.at[i] + b.at[i]); }
static inline V sub(V a, V b) { EACH(a.at[i] - b.at[i]); }
static inline V fma_(V a, V b, V c) { EACH(a.at[i] * b.at[i] + c.at[i]); }
static inline V magnitude(V a) { EACH(fabsf(a.at[i])); }
static inline V rectified(V a) { EACH(a.at[i] <= 0 ? 0 : a.at[i]); }
static inline V larger(V a, V b) { EACH(a.at[i] > b.at[i] ? a.at[i] : b.at[i]); }
static inline V smaller(V a, V b) { EACH(a.at[i] < b.at[i] ? a.at[i] : b.at[i]); }
static inline M first(int n) { return (M)((1u << n) - 1); }
static inline M at_least(V a, V b) { BITS(a.at[i] >= b.at[i]); }
static inline M above(V a, V b) { BITS(a.at[i] > b.at[i]); }
static inline M active(V z) { BITS(!(z.at[i] <= 0)); }
static inline V keep(M m, V a) { EACH(m >> i & 1 ? a.at[i] : 0); }
static inline V add_if(V a, M m, V b) { EACH(m >> i & 1 ? a.at[i] + b.at[i] : a.at[i]); }
static inline V fma_if(V a, V b, V c, M m) { EACH(m >> i & 1 ? a.at[i] * b.at[i] + c.at[i] : c.at[i]); }
static inline V pick(M m, V yes, V no) { EACH(m >> i & 1 ? yes.at[i] : no.at[i]); }

static inline float float_of(uint32_t bits) { float f; return memcpy(&f, &bits, 4), f; }
static inline uint32_t bits_of(float f) { uint32_t bits; return memcpy(&bits, &f, 4), bits; }

static inline float from_bf16(uint16_t h) { return float_of((uint32_t)h << 16); }
static inline uint16_t as_bf16(float f) {
    uint32_t u = bits_of(f);
    return f != f ? 0x7fc0 : (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static inline float from_f16(uint16_t h) { /* 2^112 moves the exponent; infinities and NaN get theirs back */
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7fff) << 13;
    float f = float_of(rest) * 0x1p112f;
    if (rest >= 0x0f800000) f = float_of(rest + 0x70000000);
    return float_of(bits_of(f) | sign);
}
static inline uint16_t as_f16(float f) {
    uint32_t u = bits_of(f), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
    if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (rest < 0x38800000) /* subnormal: adding 0.5 rounds at the right bit */
        return (uint16_t)(sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | (rest - 0x38000000 + 0x0fff + (rest >> 13 & 1)) >> 13);
}

static inline V load_f32(const float *p, int n) { EACH(i < n ? p[i] : 0); }
static inline V load_f16(const uint16_t *p, int n) { EACH(i < n ? from_f16(p[i]) : 0); }
static inline V load_bf16(const uint16_t *p, int n) { EACH(i < n ? from_bf16(p[i]) : 0); }
static inline void store_f32(float *p, V v, int n) { for (int i = 0; i < n; i++) p[i] = v.at[i]; }
static inline void store_f16(uint16_t *p, V v, int n) { for (int i = 0; i < n; i++) p[i] = as_f16(v.at[i]); }
static inline void store_bf16(uint16_t *p, V v, int n) { for (int i = 0; i < n; i++) p[i] = as_bf16(v.at[i]); }
static inline void stream_f32(float *p, V v) { store_f32(p, v, LANES); }
static inline void stream_f16(uint16_t *p, V v) { store_f16(p, v, LANES); }
static inline void stream_bf16(uint16_t *p, V v) { store_bf16(p, v, LANES); }
static inline V rounded_f32(V v) { return v; }
static inline V rounded_f16(V v) { EACH(from_f16(as_f16(v.at[i]))); }
static inline V rounded_bf16(V v) { EACH(from_bf16(as_bf16(v.at[i]))); }

static inline float one_f32(const float *p) { return *p; }
static inline float one_f16(const uint16_t *p) { return from_f16(*p); }
static inline float one_bf16(const uint16_t *p) { return from_bf16(*p); }
