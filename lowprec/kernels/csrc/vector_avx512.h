/* Sixteen floats in AVX-512. vector_avx2.h and vector_portable.h offer the same names. */
#include <immintrin.h>

typedef __m512 V;
typedef __mmask16 M;

static inline M first(int n) { return (M)((1u << n) - 1); }
static inline V set1(float a) { return _mm512_set1_ps(a); }
static inline V add(V a, V b) { return _mm512_add_ps(a, b); }
static inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
static inline V fma_(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
static inline V magnitude(V a) { return _mm512_abs_ps(a); }
static inline V rectified(V a) { return _mm512_max_ps(_mm512_setzero_ps(), a); } /* NaN stays: the second operand wins */
static inline V larger(V a, V b) { return _mm512_max_ps(a, b); }
static inline V smaller(V a, V b) { return _mm512_min_ps(a, b); }
static inline M at_least(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
static inline M above(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
static inline M active(V z) { return _mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_NLE_UQ); }
/* The masks below hold random bits. Without the barrier the compiler merges a load into the masked move, and some
 * processors take several times as long for a masked load whose bits are random. */
static inline V in_register(V a) {
    __asm__("" : "+v"(a));
    return a;
}
static inline V keep(M m, V a) { return _mm512_maskz_mov_ps(m, in_register(a)); }
static inline V add_if(V a, M m, V b) { return _mm512_mask_add_ps(a, m, a, in_register(b)); }
static inline V fma_if(V a, V b, V c, M m) { return _mm512_mask3_fmadd_ps(in_register(a), in_register(b), c, m); }
static inline V pick(M m, V yes, V no) { return _mm512_mask_blend_ps(m, in_register(no), in_register(yes)); }

static inline V load_f32(const float *p, int n) {
    return n == LANES ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(first(n), p);
}
static inline void store_f32(float *p, V v, int n) {
    if (n == LANES) _mm512_storeu_ps(p, v);
    else _mm512_mask_storeu_ps(p, first(n), v);
}
static inline void stream_f32(float *p, V v) { _mm512_stream_ps(p, v); }

static inline __m256i load_16(const uint16_t *p, int n) {
    return n == LANES ? _mm256_loadu_si256((const __m256i *)p) : _mm256_maskz_loadu_epi16(first(n), p);
}
static inline void store_16(uint16_t *p, __m256i v, int n) {
    if (n == LANES) _mm256_storeu_si256((__m256i *)p, v);
    else _mm256_mask_storeu_epi16(p, first(n), v);
}
static inline __m256i to_f16(V v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline __m256i to_bf16(V v) {
    __m512i u = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    u = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    u = _mm512_mask_mov_epi32(u, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(u);
}
static inline V of_f16(__m256i h) { return _mm512_cvtph_ps(h); }
static inline V of_bf16(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }

static inline V load_f16(const uint16_t *p, int n) { return of_f16(load_16(p, n)); }
static inline V load_bf16(const uint16_t *p, int n) { return of_bf16(load_16(p, n)); }
static inline void store_f16(uint16_t *p, V v, int n) { store_16(p, to_f16(v), n); }
static inline void store_bf16(uint16_t *p, V v, int n) { store_16(p, to_bf16(v), n); }
static inline void stream_f16(uint16_t *p, V v) { _mm256_stream_si256((__m256i *)p, to_f16(v)); }
static inline void stream_bf16(uint16_t *p, V v) { _mm256_stream_si256((__m256i *)p, to_bf16(v)); }
static inline V rounded_f32(V v) { return v; }
static inline V rounded_f16(V v) { return of_f16(to_f16(v)); }
static inline V rounded_bf16(V v) { return of_bf16(to_bf16(v)); }

static inline float one_f32(const float *p) { return *p; }
static inline float one_f16(const uint16_t *p) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(*p))); }
static inline float one_bf16(const uint16_t *p) { return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(*p << 16))); }
