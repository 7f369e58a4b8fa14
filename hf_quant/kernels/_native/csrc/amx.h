// What products on AMX share. Of the eight tiles, 0 to 3 are sums, 4 and 5 rows of x, 6 and 7 rows of W.
#include "vector.h"

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

// Sums [2][2] of 16 x 16, at c and c + right, below both by `down`: from memory, or zeros; only the first row of tiles if
// TALL is 1.
template <int TALL, class T>
inline void sums_in(const T* c, size_t right, size_t down, bool first) {
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, c, 64);
    _tile_loadd(1, c + right, 64);
    if (TALL == 2) {
      _tile_loadd(2, c + down, 64);
      _tile_loadd(3, c + down + right, 64);
    }
  }
}

template <int TALL, class T>
inline void sums_out(T* c, size_t right, size_t down) {
  _tile_stored(0, c, 64);
  _tile_stored(1, c + right, 64);
  if (TALL == 2) {
    _tile_stored(2, c + down, 64);
    _tile_stored(3, c + down + right, 64);
  }
}

inline __m512i rounded(vf v) { return _mm512_add_epi32((__m512i)v, _mm512_set1_epi32(0x8000)); }

// Two vectors of float32 to pairs of bf16.
inline __m512i pairs(vf low, vf high) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(rounded(low), 16), rounded(high));
}

}  // namespace
