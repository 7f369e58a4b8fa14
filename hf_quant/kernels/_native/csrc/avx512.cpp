#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#endif
#define SET_AVX2
#define SET_AVX512
#include "panels.h"
#include "search.h"
#include "tiles.h"

const Kernels avx512_kernels = {rows, 15, spread, panels, dequantize, search, encode, pack_tiles, turn, turn_codes};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
