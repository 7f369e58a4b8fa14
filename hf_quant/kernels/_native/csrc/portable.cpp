// What every machine runs: vectors of 16 bytes (SSE2, NEON), which compilers turn into plain numbers where there are none.
#include "panels.h"
#include "search.h"
#include "tiles.h"

const Kernels portable_kernels = {rows, 3, spread, panels, dequantize, search, encode, pack_tiles, turn, turn_codes};
