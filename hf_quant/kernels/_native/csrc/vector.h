// The kernels of one instruction set, written with the compilers' own vectors; included by the unit that sets the set.
// A unit includes no C++ library header: its inline functions would be compiled for this set and used everywhere.
#pragma once
#include "cpu.h"
#if defined(SET_AVX2)
#include <immintrin.h>
#endif

namespace {

#if defined(SET_AVX512)
const int L = 16;
#elif defined(SET_AVX2)
const int L = 8;
#else
const int L = 4;
#endif
const int H = 16 / L;  // vectors that hold one number of each of 16 rows
typedef float vf __attribute__((vector_size(4 * L)));
typedef int32_t vi __attribute__((vector_size(4 * L)));
typedef uint32_t vu __attribute__((vector_size(4 * L)));
typedef uint16_t vh __attribute__((vector_size(2 * L)));

template <class V>
inline V read(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline vf splat(float f) { return f - vf{}; }

template <int N>
struct Width {
  static const int bits = N;
};

// f(Width<bits>), for every width of a code.
template <class F>
inline void of_width(int bits, F f) {
  if (bits == 2) f(Width<2>());
  if (bits == 3) f(Width<3>());
  if (bits == 4) f(Width<4>());
  if (bits == 5) f(Width<5>());
  if (bits == 6) f(Width<6>());
  if (bits == 7) f(Width<7>());
  if (bits == 8) f(Width<8>());
}

// Codes of columns 2 r (low halves) and 2 r + 1 of a tile whose vectors are `word`, from bit 0 of each half on.
template <int BITS>
inline __attribute__((always_inline)) vu pair_at(const vu* word, int r) {
  const int per = 16 / BITS, spare = 16 - per * BITS;
  const unsigned mask = ((1u << BITS) - 1) * 0x10001u;
  if (r < per * BITS) return word[r / per] >> (r % per * BITS) & mask;
  const int from = (r - per * BITS) * BITS, to = from + BITS;  // among the spare bits
  vu code = vu{};
#pragma GCC unroll 8
  for (int v = from / (spare ? spare : 1); v * spare < to; v++) {
    const int first = v * spare > from ? v * spare : from, end = (v + 1) * spare < to ? (v + 1) * spare : to;
    code |= (word[v] >> (per * BITS + first - v * spare) & ((1u << (end - first)) - 1) * 0x10001u) << (first - from);
  }
  return code;
}

// The code at bit `shift` of each word, less 2^(BITS - 1).
template <int BITS>
inline vf value(vu word, int shift) {
  if (BITS == 8) {
    const vi code = (vi)(word << (24 - shift)) >> 24;
    return __builtin_convertvector(code, vf);
  }
#if defined(SET_AVX512)
  if (BITS > 4) return __builtin_convertvector((vi)(word >> shift & ((1u << BITS) - 1)) - (1 << (BITS - 1)), vf);
  const int m = (1 << BITS) - 1, h = 1 << (BITS - 1);
#define E(i) (float)((i & m) - h)
  const __m512 levels = _mm512_setr_ps(E(0), E(1), E(2), E(3), E(4), E(5), E(6), E(7), E(8), E(9), E(10), E(11), E(12),
                                       E(13), E(14), E(15));
#undef E
  return (vf)_mm512_permutexvar_ps((__m512i)(word >> shift), levels);  // looks at four bits and no more
#else
  const vi code = (vi)(word >> shift & ((1u << BITS) - 1)) - (1 << (BITS - 1));
  return __builtin_convertvector(code, vf);
#endif
}

// Columns 4 c to 4 c + 3 of a tile of codes that cross bytes, for L of its rows: a byte each, the odd ones after the even ones.
template <int BITS>
inline __attribute__((always_inline)) vu both_pairs(const uint8_t* tile, int c) {
  vu word[BITS];
#pragma GCC unroll 8
  for (int v = 0; v < BITS; v++) word[v] = read<vu>(tile + 64 * v);
  return pair_at<BITS>(word, 2 * c) | pair_at<BITS>(word, 2 * c + 1) << 8;
}

// Calls f(r, low, high) with columns 2 r and 2 r + 1 of a tile, for the h-th of the H parts of its 16 rows.
template <int BITS, class F>
inline __attribute__((always_inline)) void each_pair(const uint8_t* tile, int h, F f) {
  const int per = 16 / BITS;
  vu word[BITS];
#pragma GCC unroll 8
  for (int v = 0; v < BITS; v++) {
    word[v] = read<vu>(tile + 64 * v + 4 * L * h);
#pragma GCC unroll 8
    for (int i = 0; i < per; i++) f(per * v + i, value<BITS>(word[v], BITS * i), value<BITS>(word[v], 16 + BITS * i));
  }
#pragma GCC unroll 8
  for (int r = per * BITS; r < 16; r++) {
    const vu last = pair_at<BITS>(word, r);
    f(r, value<BITS>(last, 0), value<BITS>(last, 16));
  }
}

#if defined(SET_AVX512)
// 16 numbers of a row of the output, or the first of them where it ends.
inline void put(const Output& out, long at, vf v, long count) {
  if (count < 16 || out.type == F16) {
    float made[16];
    memcpy(made, &v, sizeof made);
    store(out, at, made, count);
  } else if (out.type == F32) {
    memcpy((float*)out.y + at, &v, sizeof v);
  } else {
    const vu u = (vu)v, even = u + 0x7fffu + (u >> 16 & 1);
    const vh made = __builtin_convertvector((v == v ? even : u | 0x400000u) >> 16, vh);
    memcpy((uint16_t*)out.y + at, &made, sizeof made);
  }
}
#endif

// Scales or zero points of 16 rows in one group, the h-th part.
inline vf grouped(const void* from, int type, long at, int h) {
  if (type == F32) return read<vf>((const float*)from + at * 16 + L * h);
  const vh half = read<vh>((const uint16_t*)from + at * 16 + L * h);
  return (vf)(__builtin_convertvector(half, vu) << 16);
}

inline vf bytes_at(const void* from, long at, int h) {
  const uint8_t* p = (const uint8_t*)from + at * 16 + L * h;
#if defined(SET_AVX512)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(SET_AVX2)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  return vf{(float)p[0], (float)p[1], (float)p[2], (float)p[3]};
#endif
}

// Scales of 16 rows, the h-th part; `at`: the block times groups, and the group.
inline vf scale_of(const Linear& a, long at, int h) {
  if (a.scale_type != CODED) return grouped(a.scale, a.scale_type, at, h);
  return bytes_at(a.scale, at, h) * read<vf>(a.unit + (at >> a.shift) * 16 + L * h);
}

// What is added to scaled codes that are less 2^(bits - 1), where there are zero points; `scale` is that of `scale_of`.
inline vf shift_of(const Linear& a, long at, int h, vf scale) {
  const float half = (float)(1 << (a.bits - 1));
  if (a.scale_type != CODED) return (half - grouped(a.zero, a.scale_type, at, h)) * scale;
  return half * scale - bytes_at(a.zero, at, h) * read<vf>(a.zero_unit + (at >> a.shift) * 16 + L * h);
}

// A sum of products with codes, and that of x, as what they stand for.
inline __attribute__((always_inline)) vf stands_for(const Linear& a, long at, int h, vf scale, vf sum, float all) {
  if (!a.zero) return sum * scale;
  if (a.scale_type == CODED) return sum * scale + shift_of(a, at, h, scale) * all;
  return (sum - (grouped(a.zero, a.scale_type, at, h) - (float)(1 << (a.bits - 1))) * all) * scale;
}

template <int BITS, int M>
inline void block(const Linear& a, long b, const float* x, const float* sums, long first, const Output& out) {
  const long groups = a.groups(), steps = a.group / 32;
  const int CHAINS = M == 1 ? 4 : 2;  // sums in flight, to hide the latency of additions
  const uint8_t* tile = a.q + b * a.tiles() * 64 * BITS;
  vf total[M][H] = {};
  for (long g = 0; g < groups; g++) {
    vf sum[M][H][CHAINS] = {};
    for (long t = 0; t < steps; t++, tile += 64 * BITS) {
      const float* at = x + (g * steps + t) * 32;
#if defined(SET_AVX512)
#pragma GCC unroll 8
      for (int v = 0; v < BITS; v++) _mm_prefetch((const char*)tile + 64 * v + 4096, _MM_HINT_T0);
#endif
      for (int h = 0; h < H; h++)
        each_pair<BITS>(tile, h, [&](int r, vf low, vf high) __attribute__((always_inline)) {
          const int c = r * 2 % CHAINS;
#pragma GCC unroll 4
          for (int m = 0; m < M; m++) {
            sum[m][h][c] += low * at[m * a.k + 2 * r];
            sum[m][h][c + 1] += high * at[m * a.k + 2 * r + 1];
          }
        });
    }
    for (int h = 0; h < H; h++) {
      const vf scale = scale_of(a, b * groups + g, h);
      for (int m = 0; m < M; m++) {
        vf s = sum[m][h][0] + sum[m][h][1];
        if (CHAINS == 4) s += sum[m][h][2 % CHAINS] + sum[m][h][3 % CHAINS];
        total[m][h] += stands_for(a, b * groups + g, h, scale, s, a.zero ? sums[m * groups + g] : 0);
      }
    }
  }
  const long count = a.n - 16 * b < 16 ? a.n - 16 * b : 16;
  for (int m = 0; m < M; m++) {
    float made[16];
    memcpy(made, total[m], sizeof made);
    store(out, (first + m) * a.n + 16 * b, made, count);
  }
}

template <int BITS>
void rows_of(const Linear& a, long from, long to, const float* x, const float* sums, long m, const Output& out) {
  const long k = a.k, groups = a.groups();
  for (long b = from; b < to; b++) {
    long i = 0;
    for (; i + 4 <= m; i += 4) block<BITS, 4>(a, b, x + i * k, sums + i * groups, i, out);
    if (m - i == 3) block<BITS, 3>(a, b, x + i * k, sums + i * groups, i, out);
    if (m - i == 2) block<BITS, 2>(a, b, x + i * k, sums + i * groups, i, out);
    if (m - i == 1) block<BITS, 1>(a, b, x + i * k, sums + i * groups, i, out);
  }
}

template <int BITS>
void dequantize_of(const Linear& a, long from, long to, const Output& out) {
  const long groups = a.groups(), steps = a.group / 32;
  for (long b = from; b < to; b++) {
    const uint8_t* tile = a.q + b * a.tiles() * 64 * BITS;
    const long count = a.n - 16 * b < 16 ? a.n - 16 * b : 16;
    for (long t = 0; t < a.tiles(); t++, tile += 64 * BITS) {
      float made[32][16], row[32];
      for (int h = 0; h < H; h++) {
        const vf scale = scale_of(a, b * groups + t / steps, h);
        vf zero = vf{}, shift = vf{};
        if (a.scale_type != CODED) {
          if (a.zero) zero = grouped(a.zero, a.scale_type, b * groups + t / steps, h) - (float)(1 << (BITS - 1));
        } else if (a.zero) {
          shift = shift_of(a, b * groups + t / steps, h, scale);
        }
        each_pair<BITS>(tile, h, [&](int r, vf low, vf high) {
          const vf even = (low - zero) * scale + shift, odd = (high - zero) * scale + shift;
          memcpy(made[2 * r] + L * h, &even, sizeof even);
          memcpy(made[2 * r + 1] + L * h, &odd, sizeof odd);
        });
      }
      for (long n = 0; n < count; n++) {
        for (int k = 0; k < 32; k++) row[k] = made[k][n];
        store(out, (16 * (b - from) + n) * a.k + 32 * t, row, 32);
      }
    }
  }
}

[[maybe_unused]] void rows(const Linear& a, long from, long to, const float* x, const float* sums, long m, const Output& out) {
  of_width(a.bits, [&](auto width) { rows_of<width.bits>(a, from, to, x, sums, m, out); });
}

[[maybe_unused]] void dequantize(const Linear& a, long from, long to, const Output& out) {
  of_width(a.bits, [&](auto width) { dequantize_of<width.bits>(a, from, to, out); });
}

}  // namespace
