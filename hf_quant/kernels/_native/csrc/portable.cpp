// What every machine runs: vectors of 16 bytes (SSE2, NEON), which compilers turn into plain numbers where there are none.
#include "vector.h"

const Kernels portable_kernels = {rows, dequantize};
