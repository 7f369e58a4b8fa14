// The kernels of one instruction set, written with the compilers' own vectors; included by the unit that sets the set.
// A unit includes no C++ library header: its inline functions would be compiled for this set and used everywhere.
#pragma once
#include "cpu.h"
#if defined(SET_AVX2)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
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

// Float32 to float16, to nearest, ties to even.
inline vh narrow(vf v) {
#if defined(SET_AVX512)
  return (vh)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(SET_AVX2)
  return (vh)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  return (vh)vcvt_f16_f32((float32x4_t)v);
#else
  vh half;
  for (int i = 0; i < L; i++) half[i] = float_to_f16(v[i]);
  return half;
#endif
}

// L numbers of a row of the output, or the first of them where it ends.
inline void put(const Output& out, long at, vf v, long count) {
  if (count < L) {
    float made[L];
    memcpy(made, &v, sizeof made);
    if (count > 0) store(out, at, made, count);
  } else if (out.type == F32) {
    memcpy((float*)out.y + at, &v, sizeof v);
  } else {
    const vu u = (vu)v, even = u + 0x7fffu + (u >> 16 & 1);
    const vh made = out.type == F16 ? narrow(v) : __builtin_convertvector((v == v ? even : u | 0x400000u) >> 16, vh);
    memcpy((uint16_t*)out.y + at, &made, sizeof made);
  }
}

// Float16 to float32, all numbers exactly, whatever the processor does with subnormal ones.
inline vf wide(vh half) {
#if defined(SET_AVX512)
  return (vf)_mm512_cvtph_ps((__m256i)half);
#elif defined(SET_AVX2)
  return (vf)_mm256_cvtph_ps((__m128i)half);
#elif defined(__aarch64__)
  return (vf)vcvt_f32_f16((float16x4_t)half);
#else
  const vu u = __builtin_convertvector(half, vu), sign = (u & 0x8000) << 16, rest = (u & 0x7fff) << 13;
  const vf small = (vf)(rest | 0x38800000) - 6.103515625e-05f;  // 2^-14, below which numbers are subnormal
  const vu large = rest + 0x38000000 + ((vu)(rest >= 0x0f800000) & 0x38000000);
  return (vf)(sign | (rest < 0x00800000 ? (vu)small : large));
#endif
}

inline vf byte(const uint8_t* p) {
#if defined(SET_AVX512)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(SET_AVX2)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  return vf{(float)p[0], (float)p[1], (float)p[2], (float)p[3]};
#endif
}

// Numbers of a type as float32, from the at-th on.
template <int TYPE>
inline vf numbers(const void* from, long at) {
  if (TYPE == ONE) return splat(*(const float*)from);
  if (TYPE == BYTE) return byte((const uint8_t*)from + at);
  if (TYPE == F32) return read<vf>((const float*)from + at);
  const vh half = read<vh>((const uint16_t*)from + at);
  return TYPE == F16 ? wide(half) : (vf)(__builtin_convertvector(half, vu) << 16);
}

// f(Width<type>), for every type of scales and zero points.
template <class F>
inline void of_type(int type, F f) {
  if (type == F32) f(Width<F32>());
  if (type == BF16) f(Width<BF16>());
  if (type == F16) f(Width<F16>());
  if (type == BYTE) f(Width<BYTE>());
  if (type == ONE) f(Width<ONE>());
}

// The scales and zero points of 16 rows in one group, a vector of them.
struct Group {
  vf scale, zero;  // the latter less 2^(bits - 1); or, where zero points are subtracted from scaled codes, what is added

  // A sum of products with codes less 2^(bits - 1), and that of x, as what they stand for.
  inline __attribute__((always_inline)) vf of(const Linear& a, vf sum, float all) const {
    if (!a.zero) return sum * scale;
    return a.subtracted ? sum * scale + zero * all : (sum - zero * all) * scale;
  }

  // What is added to such codes once they are scaled.
  inline vf shift(const Linear& a) const { return !a.zero ? vf{} : a.subtracted ? zero : -zero * scale; }
};

// Reads groups, counted through all blocks. Types that are read in few instructions are read where they lie; of others some
// groups are widened together, so that types are looked at once for all of them.
struct Scaling {
  static const int SOME = 16;
  bool plain;
  float half;
  long first = 0;  // of those that are widened
  alignas(64) float scale[SOME * 16], zero[SOME * 16];

  explicit Scaling(const Linear& a) : half((float)(1 << (a.bits - 1))) {
    plain = (a.scale_type == F16 || a.scale_type == BF16) && (!a.zero || a.zero_type == BYTE);
  }

  // Before groups at, ..., at + count - 1, up to SOME, are read.
  inline void widen(const Linear& a, long at, long count) {
    if (!plain) fill(a, at, count);
  }

  inline __attribute__((always_inline)) Group group(const Linear& a, long at, int h) const {
    if (!plain) return {read<vf>(scale + (at - first) * 16 + L * h), read<vf>(zero + (at - first) * 16 + L * h)};
    const long i = at * 16 + L * h;
    return {a.scale_type == F16 ? numbers<F16>(a.scale, i) : numbers<BF16>(a.scale, i),
            a.zero ? numbers<BYTE>(a.zero, i) - half : vf{}};
  }

  // The h-th part of group g of a block, whose groups are read one after the other: those that follow are fetched.
  inline __attribute__((always_inline)) Group next(const Linear& a, long b, long g, int h) {
    const long at = b * a.groups() + g, size = a.scale_type == F32 ? 64 : a.scale_type == BYTE ? 16 : 32;
    if (h == 0) {
      if (g % SOME == 0) widen(a, at, a.groups() - g < SOME ? a.groups() - g : SOME);
      if (a.scale_type != ONE) __builtin_prefetch((const uint8_t*)a.scale + (at + SOME) * size);
      if (a.zero) __builtin_prefetch((const uint8_t*)a.zero + (at + SOME) * (a.zero_type == BYTE ? 16 : size));
    }
    return group(a, at, h);
  }

 private:
  __attribute__((noinline)) void fill(const Linear& a, long at, long count) {
    first = at;
    widened(a.scale, a.scale_type, a.unit, a.shift, at, count, scale);
    if (!a.zero) return;
    widened(a.zero, a.zero_type, a.zero_unit, a.shift, at, count, zero);
    for (long i = 0; i < count * 16; i += L) {
      const vf z = read<vf>(zero + i), made = a.subtracted ? half * read<vf>(scale + i) - z : z - half;
      memcpy(zero + i, &made, sizeof made);
    }
  }

  static inline void widened(const void* from, int type, const float* unit, int by, long at, long count, float* to) {
    of_type(type, [=](auto kind) {
      for (long i = 0; i < count * 16; i += L) {
        const vf v = numbers<kind.bits>(from, at * 16 + i);
        memcpy(to + i, &v, sizeof v);
      }
    });
    for (long i = 0; unit && i < count * 16; i += L) {
      const vf v = read<vf>(to + i) * read<vf>(unit + ((at + i / 16) >> by) * 16 + i % 16);
      memcpy(to + i, &v, sizeof v);
    }
  }
};

template <int BITS, int M>
inline void block(const Linear& a, long b, const float* x, const float* sums, long first, const Output& out) {
  const long groups = a.groups(), steps = a.group / 32;
  const int CHAINS = M == 1 ? 4 : 2;  // sums in flight, to hide the latency of additions
  const uint8_t* tile = a.q + b * a.tiles() * 64 * BITS;
  Scaling scaling(a);
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
      const Group group = scaling.next(a, b, g, h);
      for (int m = 0; m < M; m++) {
        vf s = sum[m][h][0] + sum[m][h][1];
        if (CHAINS == 4) s += sum[m][h][2 % CHAINS] + sum[m][h][3 % CHAINS];
        total[m][h] += group.of(a, s, a.zero ? sums[m * groups + g] : 0);
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
  const long steps = a.group / 32;
  for (long b = from; b < to; b++) {
    const uint8_t* tile = a.q + b * a.tiles() * 64 * BITS;
    Scaling scaling(a);
    Group group[H];
    const long count = a.n - 16 * b < 16 ? a.n - 16 * b : 16;
    for (long t = 0; t < a.tiles(); t++, tile += 64 * BITS) {
      float made[32][16], row[32];
      for (int h = 0; h < H; h++) {
        if (t % steps == 0) group[h] = scaling.next(a, b, t / steps, h);
        each_pair<BITS>(tile, h, [&](int r, vf low, vf high) {
          const vf even = group[h].of(a, low, 1), odd = group[h].of(a, high, 1);
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
