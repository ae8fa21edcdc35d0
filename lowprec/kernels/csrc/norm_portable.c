#include "norm.h"
#include "vector_portable.h"
#include "norm_kernels.h"

const struct kernels portable_kernels[3] = KERNELS;
