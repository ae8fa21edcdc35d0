/* The few calls of the CUDA driver that the adapter makes, on host memory: a "device address" is a pointer. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static int failing = 0, live = 0, allocations = 0;
static __thread void *current = 0;

void stand_in_fail(int status) { failing = status; }
int stand_in_live(void) { return live; }
int stand_in_allocations(void) { return allocations; }

int cuInit(unsigned flags) { return failing; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuCtxSetCurrent(void *context) { current = context; return context == (void *)1 ? 0 : 201; }
int cuStreamCreate(void **stream, unsigned flags) { *stream = (void *)7; return 0; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, "Stand-in 1", length); return 0; }
int cuDriverGetVersion(int *version) { *version = 13020; return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) { *value = which == 75 ? 8 : 6; return 0; }
int cuMemAlloc_v2(uint64_t *address, size_t count) {
    if (!current) return 201;
    *address = (uint64_t)malloc(count);
    live++;
    allocations++;
    return 0;
}
int cuMemFree_v2(uint64_t address) { free((void *)address); live--; return 0; }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t count, void *stream) {
    memcpy((void *)to, from, count);
    return stream == (void *)7 ? 0 : 400;
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t count, void *stream) {
    memcpy(to, (void *)from, count);
    return stream == (void *)7 ? 0 : 400;
}
int cuStreamSynchronize(void *stream) { return failing; }
int cuGetErrorString(int status, const char **text) {
    *text = status == 700 ? "an illegal memory access was encountered" : "no CUDA-capable device is detected";
    return 0;
}
