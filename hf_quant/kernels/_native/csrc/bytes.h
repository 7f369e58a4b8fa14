// Codes as bytes, four to a word, for products of bytes; included by the units that have such instructions.
#include "columns.h"
#include "vector.h"

namespace {

// Four codes of each of 16 rows, the c-th of eight times four: unsigned bytes, in the order of `column`.
template <int BITS>
inline __m512i codes(const uint8_t* tile, int c) {
  if (BITS == 8) return _mm512_xor_si512(read<__m512i>(tile + 64 * c), _mm512_set1_epi8((char)0x80));
  if (8 % BITS) return (__m512i)both_pairs<BITS>(tile, c);
  const int per = 8 / BITS;  // in a byte
  return (__m512i)(read<vu>(tile + 64 * (c / per)) >> (c % per * BITS) & ((1u << BITS) - 1) * 0x01010101u);
}

// Where the columns of a tile go.
inline void in_order(int bits, __m512i order[2]) {
  int32_t at[32];
  for (int i = 0; i < 32; i++) at[i] = column(bits, i);
  order[0] = read<__m512i>(at), order[1] = read<__m512i>(at + 16);
}

inline vf half_floats(const void* x, int type, long at) {
  const __m256i h = read<__m256i>((const uint16_t*)x + at);
  return type == BF16 ? (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16) : (vf)_mm512_cvtph_ps(h);
}

// x as int8: a row of k numbers, a tile of 32 after another in the order of `codes`, to where `next()` says; `each(t, sum)`
// gets the sum of the integers of tile t. Gives the scale, NaN where one of them is not finite. `row` is room for k floats.
template <class P, class E>
inline float int8_row(const Activations& x, long at, long k, const __m512i order[2], float* row, P next, E each) {
  const bool all = !x.left;
  vi peak[2] = {};  // as bits, where infinities and NaN are the largest
  const auto higher = [&](vf v, int i) {
    const vi size = (vi)v & 0x7fffffff;
    peak[i] = size > peak[i] ? size : peak[i];
  };
  of_type(x.type, [&](auto type) {
    for (long i = 0; i < k; i += 32)
      for (int j = 0; j < 2; j++) {
        const vf v = numbers<type.bits>(x.x, at * k + i + 16 * j);
        _mm512_storeu_ps(row + i + 16 * j, (__m512)v);
        if (all) higher(v, j);
      }
  });
  for (long j = 0; j < x.left; j++) row[x.columns[j]] = 0;
  for (long i = all ? k : 0; i < k; i += 16) higher(read<vf>(row + i), 0);
  const int bits = _mm512_reduce_max_epi32((__m512i)(peak[0] > peak[1] ? peak[0] : peak[1]));
  const float most = read<float>(&bits), least = 1.17549435e-38f * 127;
  const float scale = x.fixed ? *x.fixed : (most > least ? most : least) / 127, by = 1 / scale;
  const __m512 factor = _mm512_set1_ps(by), top = _mm512_set1_ps(127), bottom = _mm512_set1_ps(-127);
  for (long t = 0; t < k / 32; t++) {
    __m512i whole[2];
    for (int i = 0; i < 2; i++) {
      const __m512 v = _mm512_mul_ps(_mm512_loadu_ps(row + 32 * t + 16 * i), factor);
      whole[i] = _mm512_cvtps_epi32(_mm512_max_ps(_mm512_min_ps(v, top), bottom));
    }
    int8_t* to = next();
    for (int i = 0; i < 2; i++)
      _mm_storeu_si128((__m128i*)(to + 16 * i), _mm512_cvtepi32_epi8(_mm512_permutex2var_epi32(whole[0], order[i], whole[1])));
    each(t, _mm512_reduce_add_epi32(_mm512_add_epi32(whole[0], whole[1])));
  }
  return scale + (most - most);
}

}  // namespace
