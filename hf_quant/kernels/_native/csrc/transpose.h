// Transposes squares of words of 32 bits, and with them a matrix.
#pragma once
#include "vector.h"

namespace {

// The numbers of one vector and of another in turn, of their first halves or of their second.
template <int HALF>
inline vf in_turn(vf a, vf b) {
#if defined(__clang__)
  vf made;
  for (int i = 0; i < L; i++) made[i] = (i % 2 ? b : a)[HALF * L / 2 + i / 2];
  return made;
#else
  vi from;
  for (int i = 0; i < L; i++) from[i] = HALF * L / 2 + i / 2 + i % 2 * L;
  return __builtin_shuffle(a, b, from);
#endif
}

inline void transpose(vf* lines) {
  for (int done = 1; done < L; done *= 2) {
    vf next[L];
#pragma GCC unroll 16
    for (int i = 0; i < L / 2; i++) {
      next[2 * i] = in_turn<0>(lines[i], lines[i + L / 2]);
      next[2 * i + 1] = in_turn<1>(lines[i], lines[i + L / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; i++) lines[i] = next[i];
  }
}

const long BAND = 64;  // rows of the result that are written together: whole lines of the caches are read for them

// Rows first, ..., last - 1 of the transpose [columns, rows] of a matrix of words [rows, columns].
[[maybe_unused]] void turn(const uint32_t* from, long rows, long columns, uint32_t* to, long first, long last) {
  for (long band = first; band < last; band += BAND) {
    const long end = last - band < BAND ? last : band + BAND, whole = rows / L * L, wide = band + (end - band) / L * L;
    for (long r = 0; r < whole; r += L)
      for (long c = band; c < wide; c += L) {
        vf lines[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; i++) lines[i] = read<vf>(from + (r + i) * columns + c);
        transpose(lines);
#pragma GCC unroll 16
        for (int i = 0; i < L; i++) memcpy(to + (c + i) * rows + r, &lines[i], sizeof(vf));
      }
    for (long c = band; c < end; c++)
      for (long r = c < wide ? whole : 0; r < rows; r++) to[c * rows + r] = from[r * columns + c];
  }
}

}  // namespace
