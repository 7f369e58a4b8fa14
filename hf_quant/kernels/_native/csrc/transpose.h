// Transposes squares of words of 32 bits, and with them a matrix.
#pragma once
#include "vector.h"

namespace {

#if defined(SET_AVX512)
// In parts of four words, which cost less to arrange than single words anywhere in a vector: first the words in them, two by two
// and four by four, then the parts.
inline void transpose(vf* lines) {
  __m512 twos[16], fours[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    twos[i] = _mm512_unpacklo_ps((__m512)lines[i], (__m512)lines[i + 1]);
    twos[i + 1] = _mm512_unpackhi_ps((__m512)lines[i], (__m512)lines[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      const __m512d one = (__m512d)twos[i + j], other = (__m512d)twos[i + j + 2];
      fours[i + 2 * j] = (__m512)_mm512_unpacklo_pd(one, other);
      fours[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd(one, other);
    }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const __m512 even[2] = {_mm512_shuffle_f32x4(fours[j], fours[4 + j], 0x88), _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0x88)};
    const __m512 odd[2] = {_mm512_shuffle_f32x4(fours[j], fours[4 + j], 0xdd), _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0xdd)};
    lines[j] = (vf)_mm512_shuffle_f32x4(even[0], even[1], 0x88), lines[4 + j] = (vf)_mm512_shuffle_f32x4(odd[0], odd[1], 0x88);
    lines[8 + j] = (vf)_mm512_shuffle_f32x4(even[0], even[1], 0xdd), lines[12 + j] = (vf)_mm512_shuffle_f32x4(odd[0], odd[1], 0xdd);
  }
}
#else
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
#endif

const long BAND = 64;  // rows of the result that are written together: whole lines of the caches are read for them

// Rows first, ..., last - 1 of the transpose of a matrix of words.
[[maybe_unused]] void turn(const Words& a, long first, long last) {
  for (long band = first; band < last; band += BAND) {
    const long end = last - band < BAND ? last : band + BAND, whole = a.rows / L * L, wide = band + (end - band) / L * L;
    for (long r = 0; r < whole; r += L)
      for (long c = band; c < wide; c += L) {
        vf lines[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; i++) lines[i] = read<vf>(a.from + (r + i) * a.stride + c);
        transpose(lines);
#pragma GCC unroll 16
        for (int i = 0; i < L; i++) memcpy(a.to + (c + i) * a.to_stride + r, &lines[i], sizeof(vf));
      }
    for (long c = band; c < end; c++)
      for (long r = c < wide ? whole : 0; r < a.rows; r++) a.to[c * a.to_stride + r] = a.from[r * a.stride + c];
  }
}

// A square of eight by eight codes of four bits in each lane: one word of it in each vector.
inline void transpose_codes(vu* word) {
#pragma GCC unroll 3
  for (int by = 4; by; by /= 2) {
    const uint32_t mask = by == 4 ? 0xffff : by == 2 ? 0x00ff00ff : 0x0f0f0f0f;
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      if (i & by) continue;
      const vu other = (word[i] >> 4 * by ^ word[i + by]) & mask;
      word[i + by] ^= other, word[i] ^= other << 4 * by;
    }
  }
}

// The same as `turn` for the codes of four bits in words, eight rows of the result for each column of words: code i of a word
// belongs to the row that digit i of `order` says. As many rows of words as are a multiple of eight.
[[maybe_unused]] void turn_codes(const Words& a, uint32_t order, long first, long last) {
  const long whole = a.rows / (8 * L) * (8 * L), wide = first + (last - first) / L * L;
  const auto row = [=](long c, int i) { return a.to + (8 * c + (order >> 4 * i & 15)) * a.to_stride; };
  for (long c = first; c < wide; c += L)
    for (long r = 0; r < whole; r += 8 * L) {
      vf lines[8][L];
      for (int s = 0; s < L; s++) {
        vu word[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) word[i] = read<vu>(a.from + (r + 8 * s + i) * a.stride + c);
        transpose_codes(word);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) lines[i][s] = (vf)word[i];
      }
      for (int i = 0; i < 8; i++) {
        transpose(lines[i]);
        for (int l = 0; l < L; l++) memcpy(row(c + l, i) + r / 8, &lines[i][l], sizeof(vf));
      }
    }
  for (long c = first; c < last; c++)
    for (long r = c < wide ? whole : 0; r < a.rows; r += 8)
      for (int i = 0; i < 8; i++) {
        uint32_t word = 0;
        for (int s = 0; s < 8; s++) word |= (a.from[(r + s) * a.stride + c] >> 4 * i & 15) << 4 * s;
        row(c, i)[r / 8] = word;
      }
}

}  // namespace
