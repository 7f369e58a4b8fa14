// The order in which the codes of a tile come out of its words as bytes, four to a word.
#pragma once

namespace {

// The column of a tile that the i-th byte stands for.
inline int column(int bits, int i) {
  const int c = i / 4, b = i % 4;
  if (bits == 8 || 8 % bits) return 4 * c + (b == 1 ? 2 : b == 2 ? 1 : b);
  const int per = 8 / bits, v = c / per, half = b / 2, place = b % 2 * per + c % per;
  return 2 * (v * 16 / bits + place) + half;
}

}  // namespace
