/* Sixteen floats in AVX2, FMA and F16C: two registers. Names: see vector_avx512.h. */
#include <immintrin.h>
#include <string.h>

typedef struct { __m256 lo, hi; } V;
typedef uint16_t M;

#define BOTH(expression_lo, expression_hi) ((V){expression_lo, expression_hi})

static inline M first(int n) { return (M)((1u << n) - 1); }
static inline V set1(float a) { return BOTH(_mm256_set1_ps(a), _mm256_set1_ps(a)); }
static inline V add(V a, V b) { return BOTH(_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)); }
static inline V sub(V a, V b) { return BOTH(_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)); }
static inline V fma_(V a, V b, V c) { return BOTH(_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)); }
static inline V magnitude(V a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return BOTH(_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi));
}
static inline V rectified(V a) {
    return BOTH(_mm256_max_ps(_mm256_setzero_ps(), a.lo), _mm256_max_ps(_mm256_setzero_ps(), a.hi));
}
static inline V larger(V a, V b) { return BOTH(_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)); }
static inline V smaller(V a, V b) { return BOTH(_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)); }
static inline M bits_of(__m256 lo, __m256 hi) { return (M)(_mm256_movemask_ps(lo) | _mm256_movemask_ps(hi) << 8); }
static inline M at_least(V a, V b) {
    return bits_of(_mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ));
}
static inline M above(V a, V b) {
    return bits_of(_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ));
}
static inline M active(V z) {
    const __m256 zero = _mm256_setzero_ps();
    return bits_of(_mm256_cmp_ps(z.lo, zero, _CMP_NLE_UQ), _mm256_cmp_ps(z.hi, zero, _CMP_NLE_UQ));
}
static inline V spread(M m) { /* all ones in the lanes whose bit is set */
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i lo = _mm256_and_si256(_mm256_set1_epi32(m), bit), hi = _mm256_and_si256(_mm256_set1_epi32(m >> 8), bit);
    return BOTH(_mm256_castsi256_ps(_mm256_cmpeq_epi32(lo, bit)), _mm256_castsi256_ps(_mm256_cmpeq_epi32(hi, bit)));
}
static inline V keep(M m, V a) {
    V s = spread(m);
    return BOTH(_mm256_and_ps(s.lo, a.lo), _mm256_and_ps(s.hi, a.hi));
}
static inline V add_if(V a, M m, V b) { return add(a, keep(m, b)); }
static inline V fma_if(V a, V b, V c, M m) { return fma_(keep(m, a), b, c); }
static inline V pick(M m, V yes, V no) {
    V s = spread(m);
    return BOTH(_mm256_blendv_ps(no.lo, yes.lo, s.lo), _mm256_blendv_ps(no.hi, yes.hi, s.hi));
}

static inline V load_f32(const float *p, int n) {
    float part[LANES] = {0};
    if (n != LANES) p = memcpy(part, p, sizeof(float) * (size_t)n);
    return BOTH(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8));
}
static inline void store_f32(float *p, V v, int n) {
    float part[LANES], *to = n == LANES ? p : part;
    _mm256_storeu_ps(to, v.lo);
    _mm256_storeu_ps(to + 8, v.hi);
    if (n != LANES) memcpy(p, part, sizeof(float) * (size_t)n);
}
static inline void stream_f32(float *p, V v) { _mm256_stream_ps(p, v.lo), _mm256_stream_ps(p + 8, v.hi); }

typedef struct { __m128i lo, hi; } H;
static inline H load_16(const uint16_t *p, int n) {
    uint16_t part[LANES] = {0};
    if (n != LANES) p = memcpy(part, p, sizeof(uint16_t) * (size_t)n);
    return (H){_mm_loadu_si128((const __m128i *)p), _mm_loadu_si128((const __m128i *)(p + 8))};
}
static inline void store_16(uint16_t *p, H h, int n) {
    uint16_t part[LANES], *to = n == LANES ? p : part;
    _mm_storeu_si128((__m128i *)to, h.lo);
    _mm_storeu_si128((__m128i *)(to + 8), h.hi);
    if (n != LANES) memcpy(p, part, sizeof(uint16_t) * (size_t)n);
}
static inline H to_f16(V v) {
    return (H){_mm256_cvtps_ph(v.lo, _MM_FROUND_TO_NEAREST_INT), _mm256_cvtps_ph(v.hi, _MM_FROUND_TO_NEAREST_INT)};
}
static inline __m128i half_to_bf16(__m256 v) {
    __m256i u = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    u = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    u = _mm256_blendv_epi8(u, _mm256_set1_epi32(0x7fc0), nan);
    u = _mm256_permute4x64_epi64(_mm256_packus_epi32(u, u), 0xd8);
    return _mm256_castsi256_si128(u);
}
static inline H to_bf16(V v) { return (H){half_to_bf16(v.lo), half_to_bf16(v.hi)}; }
static inline V of_f16(H h) { return BOTH(_mm256_cvtph_ps(h.lo), _mm256_cvtph_ps(h.hi)); }
static inline V of_bf16(H h) {
    return BOTH(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h.lo), 16)),
                _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h.hi), 16)));
}
static inline void stream_16(uint16_t *p, H h) {
    _mm_stream_si128((__m128i *)p, h.lo), _mm_stream_si128((__m128i *)(p + 8), h.hi);
}

static inline V load_f16(const uint16_t *p, int n) { return of_f16(load_16(p, n)); }
static inline V load_bf16(const uint16_t *p, int n) { return of_bf16(load_16(p, n)); }
static inline void store_f16(uint16_t *p, V v, int n) { store_16(p, to_f16(v), n); }
static inline void store_bf16(uint16_t *p, V v, int n) { store_16(p, to_bf16(v), n); }
static inline void stream_f16(uint16_t *p, V v) { stream_16(p, to_f16(v)); }
static inline void stream_bf16(uint16_t *p, V v) { stream_16(p, to_bf16(v)); }
static inline V rounded_f32(V v) { return v; }
static inline V rounded_f16(V v) { return of_f16(to_f16(v)); }
static inline V rounded_bf16(V v) { return of_bf16(to_bf16(v)); }

static inline float one_f32(const float *p) { return *p; }
static inline float one_f16(const uint16_t *p) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(*p))); }
static inline float one_bf16(const uint16_t *p) { return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(*p << 16))); }
