// What the units of ARM have in common: codes as bytes, and results. Included by them alone.
#pragma once
#include <arm_neon.h>

#include "vector.h"

namespace {

// Four codes of each of four rows, the c-th of eight times four, in the order of `column`: unsigned, those of 8 bits less 128.
template <int BITS>
inline int8x16_t codes(const uint8_t* tile, int c, int h) {
  if (BITS == 8) return read<int8x16_t>(tile + 64 * c + 16 * h);
  if (8 % BITS) return (int8x16_t)both_pairs<BITS>(tile + 16 * h, c);
  const int per = 8 / BITS;  // in a byte
  return (int8x16_t)(read<vu>(tile + 64 * (c / per) + 16 * h) >> (c % per * BITS) & ((1u << BITS) - 1) * 0x01010101u);
}

// What block b gives for a row of x.
inline void give(const Linear& a, long b, const vf* total, long row, const Output& out) {
  float made[16];
  memcpy(made, total, sizeof made);
  store(out, row * a.n + 16 * b, made, a.n - 16 * b < 16 ? a.n - 16 * b : 16);
}

}  // namespace
