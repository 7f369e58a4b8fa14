// Portable codes to tiles (see cpu.h) and back, a block of 16 rows at a time. Included by the module alone.
#pragma once
#include <stdint.h>
#include <string.h>

namespace {

inline unsigned code_at(const uint8_t* row, int bits, long k) {
  const long bit = k * bits;
  unsigned word = row[bit >> 3];
  if ((bit & 7) + bits > 8) word |= (unsigned)row[(bit >> 3) + 1] << 8;
  return word >> (bit & 7) & ((1u << bits) - 1);
}

// Where bit j of column 2 r (and half a word on, of 2 r + 1) of a tile lies, vector and bit; true where the next bits follow it.
inline bool place(int bits, int r, int j, int* vector, int* shift) {
  const int per = 16 / bits, spare = 16 - per * bits, at = (r - per * bits) * bits + j;
  if (at < j) {
    *vector = r / per, *shift = r % per * bits + j;
    return true;
  }
  *vector = at / spare, *shift = per * bits + at % spare;
  return false;
}

void pack_block(const uint8_t* rows, uint8_t* tiles, int bits, long n, long k) {
  const long bytes = k * bits / 8;
  for (long t = 0; t < k / 32; t++, tiles += 64 * bits) {
    uint32_t words[8][16] = {};
    for (long i = 0; i < n; i++)
      for (int c = 0; c < 32; c++) {
        unsigned code = code_at(rows + i * bytes, bits, 32 * t + c) ^ (bits == 8 ? 128 : 0);
        int v, s;
        if (place(bits, c / 2, 0, &v, &s)) words[v][i] |= code << (s + c % 2 * 16);
        else
          for (int j = 0; j < bits; j++) {
            place(bits, c / 2, j, &v, &s);
            words[v][i] |= (code >> j & 1) << (s + c % 2 * 16);
          }
      }
    memcpy(tiles, words, 64 * bits);
  }
}

void unpack_block(const uint8_t* tiles, uint8_t* rows, int bits, long n, long k) {
  const long bytes = k * bits / 8;
  memset(rows, 0, n * bytes);
  for (long t = 0; t < k / 32; t++, tiles += 64 * bits) {
    uint32_t words[8][16];
    memcpy(words, tiles, 64 * bits);
    for (long i = 0; i < n; i++)
      for (int c = 0; c < 32; c++) {
        unsigned code = 0;
        int v, s;
        if (place(bits, c / 2, 0, &v, &s)) code = words[v][i] >> (s + c % 2 * 16) & ((1u << bits) - 1);
        else
          for (int j = 0; j < bits; j++) {
            place(bits, c / 2, j, &v, &s);
            code |= (words[v][i] >> (s + c % 2 * 16) & 1) << j;
          }
        code ^= bits == 8 ? 128 : 0;
        const long bit = (32 * t + c) * bits;
        rows[i * bytes + (bit >> 3)] |= (uint8_t)(code << (bit & 7));
        if ((bit & 7) + bits > 8) rows[i * bytes + (bit >> 3) + 1] |= (uint8_t)(code >> (8 - (bit & 7)));
      }
  }
}

}  // namespace
