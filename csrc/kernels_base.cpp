// For every processor: 16-byte vectors (SSE2 on x86-64, NEON on 64-bit Arm).
#include "system.h"

#define HEAT_NAMESPACE base
#define HEAT_VECTOR_BYTES 16
#include "kernels.h"
