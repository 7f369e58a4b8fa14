#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define SET_AVX2
#include "panels.h"
#include "search.h"
#include "tiles.h"

const Kernels avx2_kernels = {rows, 3, spread, panels, dequantize, search, encode, pack_tiles, turn, turn_codes};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
