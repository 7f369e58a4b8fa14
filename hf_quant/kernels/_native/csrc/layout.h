// Tiles (see cpu.h) to portable codes, a block of 16 rows at a time; the way there is in tiles.h. Included by the module alone.
#pragma once
#include <stdint.h>
#include <string.h>

namespace {

// What holds 16 codes.
template <int BITS>
struct Sixteen {
  typedef unsigned __int128 Bits;
};
template <>
struct Sixteen<2> {
  typedef uint64_t Bits;
};
template <>
struct Sixteen<3> : Sixteen<2> {};
template <>
struct Sixteen<4> : Sixteen<2> {};

// Swaps fields of a word that lie `by` bits apart, the lower ones under the mask.
inline uint64_t swapped(uint64_t x, int by, uint64_t mask) {
  const uint64_t other = (x >> by ^ x) & mask;
  return x ^ other ^ other << by;
}

// A tile's 32 codes of one row: those of even columns side by side, and those of odd columns.
template <int BITS>
struct Row {
  typedef typename Sixteen<BITS>::Bits Bits;
  static constexpr int PER = 16 / BITS, SPARE = 16 - PER * BITS, HALF = 4 * BITS;
  static constexpr uint64_t FIELD = (1u << BITS) - 1, FIELDS = FIELD << BITS | FIELD;
  static constexpr uint64_t MIDDLE = FIELD << BITS | FIELD << 5 * BITS;  // one after the first, and one after the fifth
  Bits even = 0, odd = 0;

  void give(uint8_t* codes) const {
    for (int g = 0; g < 4; g++) {
      const uint64_t mask = ((uint64_t)1 << HALF) - 1;
      uint64_t eight = ((uint64_t)(even >> g * HALF) & mask) | ((uint64_t)(odd >> g * HALF) & mask) << HALF;
      eight = swapped(swapped(eight, 2 * BITS, FIELDS << 2 * BITS), BITS, MIDDLE);
      memcpy(codes + g * BITS, &eight, BITS);
    }
  }

  // The codes that vector v holds in half a word.
  static Bits whole(uint32_t word, int v) {
    Bits codes = (Bits)(word & ((1u << PER * BITS) - 1)) << v * PER * BITS;
    if (SPARE) codes |= (Bits)(word >> PER * BITS & ((1u << SPARE) - 1)) << (PER * BITS * BITS + v * SPARE) % (8 * (int)sizeof(Bits));
    return codes;
  }
};

template <int BITS>
void unpack_rows(const uint8_t* tiles, uint8_t* rows, long n, long k) {
  const uint32_t sign = BITS == 8 ? 0x80808080 : 0;
  for (long t = 0; t < k / 32; t++, tiles += 64 * BITS) {
    uint32_t words[BITS][16];
    memcpy(words, tiles, sizeof words);
    for (long i = 0; i < n; i++) {
      Row<BITS> row;
      for (int v = 0; v < BITS; v++) row.even |= row.whole((words[v][i] ^ sign) & 0xffff, v), row.odd |= row.whole((words[v][i] ^ sign) >> 16, v);
      row.give(rows + (i * k / 32 + t) * 4 * BITS);
    }
  }
}

void unpack_block(const uint8_t* tiles, uint8_t* rows, int bits, long n, long k) {
  void (*const unpacks[])(const uint8_t*, uint8_t*, long, long) = {unpack_rows<2>, unpack_rows<3>, unpack_rows<4>, unpack_rows<5>,
                                                                   unpack_rows<6>, unpack_rows<7>, unpack_rows<8>};
  unpacks[bits - 2](tiles, rows, n, k);
}

// Values of rows [n, groups] to blocks of 16 rows, [groups, 16] each, with zeros in rows that are not there.
template <class T>
void pack_values(const T* rows, T* blocks, long n, long groups) {
  for (long g = 0; g < groups; g++)
    for (long i = 0; i < 16; i++) blocks[16 * g + i] = i < n ? rows[i * groups + g] : 0;
}

// Whether no number is NaN or infinite: their exponents have all bits set.
template <class T>
bool all_finite(const T* numbers, long count, T exponent) {
  T odd = 0;
  for (long i = 0; i < count; i++) odd |= (numbers[i] & exponent) == exponent;
  return !odd;
}

}  // namespace
