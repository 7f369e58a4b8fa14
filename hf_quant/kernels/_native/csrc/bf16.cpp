// Many rows of x in bf16, without AMX. Some columns of two blocks of W at a time become bf16, in what stays in the first-level
// cache, and are multiplied by all rows. Codes less 2^(bits - 1) are exact in bf16: where groups are large, they are what is
// multiplied, and scales and zero points are applied to sums; where groups are small or rows are many, to the weights, which
// are then rounded.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#endif
#define SET_AVX2
#define SET_AVX512
#include "blocked.h"

namespace {

// Two vectors of float32 to pairs of bf16.
inline __m512i pairs(vf low, vf high) {
  alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), both);
}

// Float32 that bf16 holds exactly.
inline __m512i exact(vf low, vf high) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32((__m512i)low, 16), (__m512i)high);
}

// Columns of a tile as codes less 2^(BITS - 1), a pair of them every 128 bytes.
template <int BITS>
inline void expanded(const uint8_t* tile, uint8_t* out) {
  if (BITS > 5) {
    each_pair<BITS>(tile, 0, [&](int r, vf low, vf high) __attribute__((always_inline)) {
      _mm512_store_si512(out + 128 * r, exact(low, high));
    });
    return;
  }
  alignas(64) uint16_t at[32];
  for (int i = 0; i < 32; i++) at[i] = float_to_bf16((float)(i % (1 << BITS) - (1 << (BITS - 1))));
  const __m512i levels = _mm512_load_si512(at);
  const int per = 16 / BITS;
  vu word[BITS];
#pragma GCC unroll 8
  for (int v = 0; v < BITS; v++) {
    word[v] = read<vu>(tile + 64 * v);
#pragma GCC unroll 8
    for (int i = 0; i < per; i++)  // looks at five bits and no more, of which some do not matter
      _mm512_store_si512(out + 128 * (per * v + i), _mm512_permutexvar_epi16((__m512i)(word[v] >> (BITS * i)), levels));
  }
#pragma GCC unroll 8
  for (int r = per * BITS; r < 16; r++)
    _mm512_store_si512(out + 128 * r, _mm512_permutexvar_epi16((__m512i)pair_at<BITS>(word, r), levels));
}

// Pairs of columns in bf16.
struct Halves {
  typedef __m512 Sum;
  static inline Sum start(const Part&, int) { return _mm512_setzero_ps(); }
  static inline Sum more(Sum sum, __m512i w, __m512i x) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }
  static inline vf number(Sum sum) { return (vf)sum; }
  static inline vi offset(const uint8_t*, long) { return vi{}; }

  // A chunk of block b.
  template <int BITS>
  static void chunk(const Linear& a, long b, long t0, long count, bool scaled, uint8_t* out) {
    const long groups = a.groups(), steps = a.group / 32;
    const uint8_t* tile = a.q + (b * a.tiles() + t0) * 64 * BITS;
    Scaling scaling(a);
    if (scaled) scaling.widen(a, b * groups + t0 / steps, (t0 + count - 1) / steps - t0 / steps + 1);
    for (long t = t0; t < t0 + count; t++, tile += 64 * BITS, out += 16 * 128) {
      if (scaled) {
        const Group group = scaling.group(a, b * groups + t / steps, 0);
        const vf scale = group.scale, shift = group.shift(a);
        each_pair<BITS>(tile, 0, [&](int r, vf low, vf high) __attribute__((always_inline)) {
          _mm512_store_si512(out + 128 * r, pairs(low * scale + shift, high * scale + shift));
        });
      } else {
        expanded<BITS>(tile, out);
      }
    }
  }

  static inline void give(const float* from, const RowTiles&, const Output& out, long, long at, long count) {
    const __m512i made = (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(from + 16), _mm512_load_ps(from));
    _mm512_mask_storeu_epi16((uint16_t*)out.y + at, count < 32 ? (1u << count) - 1 : ~0u, made);
  }
};

}  // namespace

void bf16_pack(const uint16_t* x, const Linear& a, long tile, const RowTiles& out) {
  const long groups = a.groups();
  const long first = out.first(tile), height = out.height(tile);
  for (long t0 = 0; t0 < a.tiles(); t0 += CHUNK) {
    const long count = a.tiles() - t0 < CHUNK ? a.tiles() - t0 : CHUNK;
    side_by_side((const uint8_t*)(x + first * a.k + 32 * t0), 2 * a.k, height, 16 * count, 0, out.at(t0, count, tile));
  }
  if (!a.zero || out.scaled) return;
  for (long i = 0; i < height; i++)
    for (long g = 0; g < groups; g++) {
      const uint16_t* from = x + (first + i) * a.k + g * a.group;
      vf sum = vf{};
      for (long j = 0; j < a.group; j += 16) sum += (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(read<__m256i>(from + j)), 16);
      out.sums[(first + i) * groups + g] = _mm512_reduce_add_ps((__m512)sum);
    }
}

void bf16_linear(const Linear& a, long from, long to, const RowTiles& x, uint8_t* room, const Output& out) {
  of_width(a.bits, [&](auto width) { linear<Halves, width.bits>(a, from, to, x, room, out); });
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
