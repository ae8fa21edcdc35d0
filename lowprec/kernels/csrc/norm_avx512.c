#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,popcnt")
#endif
#include "norm.h"
#include "vector_avx512.h"
#include "norm_kernels.h"

const struct kernels avx512_kernels[3] = KERNELS;
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
