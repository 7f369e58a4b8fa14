// Portable codes to tiles (see cpu.h), a row in each lane; the way back is in layout.h.
#pragma once
#include "transpose.h"

namespace {

// Swaps fields of words that lie `by` bits apart, the lower ones under the mask.
inline __attribute__((always_inline)) vu exchanged(vu x, int by, uint32_t mask) {
  const vu other = (x >> by ^ x) & mask;
  return x ^ other ^ other << by;
}

// Codes of even columns from the low half of a word on, and of odd ones from its high half on, in 2, 4 or 8 bits.
template <int BITS>
inline __attribute__((always_inline)) vu apart(vu x) {
  if (BITS == 2) x = exchanged(x, 2, 0x0c0c0c0c);
  if (BITS <= 4) x = exchanged(x, 4, 0x00f000f0);
  return exchanged(x, 8, 0x0000ff00);
}

// The code of column `at` of a tile whose codes stand one after the other in `in`.
template <int BITS>
inline __attribute__((always_inline)) vu code_at(const vu* in, int at) {
  const int word = at * BITS / 32, shift = at * BITS % 32;
  vu code = in[word] >> shift;
  if (shift + BITS > 32) code |= in[word + 1] << (32 - shift);
  return code & ((1u << BITS) - 1);
}

// The vectors of a tile: what `pair_at` reads.
template <int BITS>
inline __attribute__((always_inline)) void tile_of(const vu* in, vu* out) {
  if (BITS == 2 || BITS == 4 || BITS == 8) {
    for (int v = 0; v < BITS; v++) out[v] = apart<BITS>(in[v]) ^ (BITS == 8 ? 0x80808080 : 0);
    return;
  }
  const int per = 16 / BITS, spare = 16 - per * BITS;
  for (int v = 0; v < BITS; v++) out[v] = vu{};
#pragma GCC unroll 16
  for (int r = 0; r < 16; r++) {
    const vu pair = code_at<BITS>(in, 2 * r) | code_at<BITS>(in, 2 * r + 1) << 16;
    if (r < per * BITS) {
      out[r / per] |= pair << r % per * BITS;
      continue;
    }
    const int from = (r - per * BITS) * BITS, to = from + BITS;  // among the spare bits
#pragma GCC unroll 8
    for (int v = from / (spare ? spare : 1); v * spare < to; v++) {
      const int first = v * spare > from ? v * spare : from, end = (v + 1) * spare < to ? (v + 1) * spare : to;
      out[v] |= (pair >> (first - from) & ((1u << (end - first)) - 1) * 0x10001u) << (per * BITS + first - v * spare);
    }
  }
}

// Words `at` to `at + count` of L rows, `words` long each, a row in each lane; `none` in rows beyond the first n.
inline void words_of_rows(const uint8_t* rows, long words, long n, long at, long count, uint32_t none, vu* to) {
  if (n >= L && count % L == 0) {
    for (long w = 0; w < count; w += L) {
      vf lines[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; i++) lines[i] = read<vf>(rows + 4 * (i * words + at + w));
      transpose(lines);
      memcpy(to + w, lines, sizeof lines);
    }
    return;
  }
  for (long w = 0; w < count; w++)
    for (int i = 0; i < L; i++) to[w][i] = i < n ? read<uint32_t>(rows + 4 * (i * words + at + w)) : none;
}

template <int BITS>
void pack_tiles(const uint8_t* rows, uint8_t* tiles, long n, long k) {
  const long words = k * BITS / 32;
  vu in[L * BITS], out[BITS];
  for (long t = 0; t < k / 32; t += L)
    for (int h = 0; h < H; h++) {
      const long count = k / 32 - t < L ? k / 32 - t : L;
      words_of_rows(rows + 4 * h * L * words, words, n - h * L, t * BITS, count * BITS, BITS == 8 ? 0x80808080 : 0, in);
      for (long c = 0; c < count; c++) {
        tile_of<BITS>(in + c * BITS, out);
        for (int v = 0; v < BITS; v++) memcpy(tiles + ((t + c) * BITS + v) * 64 + 4 * h * L, &out[v], sizeof(vu));
      }
    }
}

[[maybe_unused]] void pack_tiles(const uint8_t* rows, uint8_t* tiles, int bits, long n, long k) {
  of_width(bits, [&](auto width) { pack_tiles<width.bits>(rows, tiles, n, k); });
}

}  // namespace
