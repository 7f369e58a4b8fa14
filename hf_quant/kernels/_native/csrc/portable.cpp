// What every machine runs: vectors of 16 bytes (SSE2, NEON), which compilers turn into plain numbers where there are none.
#include "rounding.h"

const Kernels portable_kernels = {rows, dequantize, search, encode};
