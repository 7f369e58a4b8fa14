// What products on AMX share. Of the eight tiles, 0 to 3 are sums, 4 and 5 rows of x, 6 and 7 rows of W.
#include <immintrin.h>

#include "cpu.h"

namespace {

// GCC does not tell its optimizer that tiles are loaded from memory.
#define BARRIER __asm__ volatile("" ::: "memory")

struct __attribute__((packed)) Config {
  uint8_t palette, start, reserved[14];
  uint16_t columns[16];
  uint8_t rows[16];
};

// For m rows of x, and tiles of x that are `wide` bytes.
inline void configure(long m, int wide) {
  Config config = {};
  config.palette = 1;
  for (int i = 0; i < 8; i++) config.columns[i] = 64, config.rows[i] = 16;
  config.columns[4] = config.columns[5] = (uint16_t)wide;
  config.rows[6] = config.rows[7] = (uint8_t)(wide / 4);
  if (m < 16) config.rows[0] = config.rows[1] = config.rows[4] = (uint8_t)m;
  _tile_loadconfig(&config);
}

}  // namespace
