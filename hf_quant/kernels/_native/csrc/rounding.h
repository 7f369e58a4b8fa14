// Rounds groups of a weight to the codes that PyTorch computes in `hf_quant.core.numerics`, and packs them.
#pragma once
#include <type_traits>

#include "vector.h"

namespace {

const float WHOLE = 12582912;  // 1.5 * 2^23: added to a number below 2^22, it rounds it to a whole one, ties to even

inline vf lesser(vf a, vf b) {
#if defined(SET_AVX512)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(SET_AVX2)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// The second one where one of them is NaN.
inline vf larger(vf a, vf b) {
#if defined(SET_AVX512)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(SET_AVX2)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// Keeps a product and a sum apart, which the compiler would round once together.
template <class V>
inline V rounded(V v) {
  asm("" : "+m"(v));
  return v;
}

// Whether a comparison holds for one of the numbers at least.
inline bool any(vi holds) {
#if defined(SET_AVX512)
  return _mm512_movepi32_mask((__m512i)holds) != 0;
#elif defined(SET_AVX2)
  return _mm256_movemask_ps((__m256)holds) != 0;
#else
  int32_t some = 0;
  for (int i = 0; i < L; i++) some |= holds[i];
  return some != 0;
#endif
}

// To the nearest whole number, ties to even; for numbers below 2^22.
inline vf rounded_whole(vf v) { return (v + splat(WHOLE)) - splat(WHOLE); }

// L numbers of a type as float32, with zeros behind the first `count`.
template <int TYPE>
inline __attribute__((always_inline)) vf some_numbers(const void* from, long at, long count) {
  if (count >= L) return numbers<TYPE>(from, at);
  float part[L] = {};
  load(from, TYPE, at, part, count);
  return read<vf>(part);
}

const long TOGETHER = 256;  // codes that are packed at a time, of several small groups

// Codes, a byte each, eight after another in BITS bytes; some that are read lie behind the last one.
template <int BITS>
inline void pack(const uint8_t* codes, long count, uint8_t* to) {
  typedef uint64_t words __attribute__((vector_size(4 * L)));
  for (long i = 0; i < count; i += 4 * L, to += L / 2 * BITS) {
    words word = read<words>(codes + i);
    word = (word & 0x00ff00ff00ff00ff) | (word >> 8 & 0x00ff00ff00ff00ff) << BITS;
    word = (word & 0x0000ffff0000ffff) | (word >> 16 & 0x0000ffff0000ffff) << 2 * BITS;
    word = (word & 0x00000000ffffffff) | word >> 32 << 4 * BITS;
    if constexpr (BITS == 2 || BITS == 4 || BITS == 8) {
      typedef std::conditional_t<BITS == 2, uint16_t, std::conditional_t<BITS == 4, uint32_t, uint64_t>> number;
      typedef number packed __attribute__((vector_size(L / 2 * BITS)));
      const packed all = __builtin_convertvector(word, packed);
      memcpy(to, &all, count - i < 4 * L ? (count - i) / 8 * BITS : sizeof all);
    } else {
      uint64_t eight[L / 2];
      memcpy(eight, &word, sizeof eight);
      for (int w = 0; w < L / 2 && i + 8 * w < count; w++) memcpy(to + w * BITS, &eight[w], BITS);
    }
  }
}

// The codes of a group, a byte each, and up to L - 1 bytes behind them.
template <int BITS, int TYPE>
inline void codes_of_group(const Encoding& a, long g, uint8_t* codes) {
  typedef uint8_t bytes __attribute__((vector_size(L)));
  const long size = a.size;
  const void* from = a.w;
  const float scale = a.scale[g], zero = a.zero[g], most = (float)((1 << BITS) - 1);
  for (long i = 0; i < size; i += L) {
    const vf real = some_numbers<TYPE>(from, g * size + i, size - i) / scale;
    const vf whole = rounded_whole(lesser(larger(real, splat(-zero)), splat(most - zero)));
    const vf code = larger(whole + zero, vf{});  // what is no number becomes zero
    const bytes made = __builtin_convertvector(__builtin_convertvector(code, vi), bytes);
    memcpy(codes + i, &made, sizeof made);
  }
}

// Groups whose columns are a multiple of 8.
[[maybe_unused]] void encode(const Encoding& a, long from, long to, uint8_t* room) {
  const long some = a.size < TOGETHER ? TOGETHER / a.size : 1;
  of_width(a.bits, [&](auto width) {
    of_type(a.type, [&](auto type) {
      for (long first = from; first < to; first += some) {
        const long count = to - first < some ? to - first : some;
        for (long g = 0; g < count; g++) codes_of_group<width.bits, type.bits>(a, first + g, room + g * a.size);
        pack<width.bits>(room, count * a.size, a.codes + first * a.size * width.bits / 8);
      }
    });
  });
}

}  // namespace
