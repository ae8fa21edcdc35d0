#include "norm.h"
#include "vector_portable.h"
#define CASE static __attribute__((noinline))
#include "norm_kernels.h"

const struct kernels portable_kernels[3] = KERNELS;
