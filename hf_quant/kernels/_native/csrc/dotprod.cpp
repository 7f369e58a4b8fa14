// Products of bytes on ARM, where the processor has SDOT (ARMv8.2 with dotprod): what vnni.cpp does elsewhere.
#if defined(__aarch64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#include <math.h>

#include "arm_codes.h"
#include "columns.h"

namespace {

template <int BITS, int M, int D>
void byte_block(const Linear& a, long b, const Digits& x, long first, const Output& out) {
  const long groups = a.groups(), steps = a.group / 32, tiles = a.tiles();
  const uint8_t* tile = a.q + b * tiles * 64 * BITS;
  Scaling scaling(a);
  vf total[M][H] = {};
  for (long g = 0; g < groups; g++) {
    vf sum[M][H] = {};
    float all[M] = {};
    for (long t = g * steps; t < (g + 1) * steps; t++, tile += 64 * BITS)
      for (int h = 0; h < H; h++) {
        int32x4_t high[M], low[M];
        for (int m = 0; m < M; m++) high[m] = vdupq_n_s32(0), low[m] = vdupq_n_s32(x.less[(first + m) * tiles + t]);
#pragma GCC unroll 8
        for (int c = 0; c < 8; c++) {
          const int8x16_t code = codes<BITS>(tile, c, h);
#pragma GCC unroll 4
          for (int m = 0; m < M; m++) {
            const int8_t* at = x.digits + ((first + m) * tiles + t) * 32 * D + 4 * c;
            if (D == 2) high[m] = vdotq_s32(high[m], code, vreinterpretq_s8_s32(vdupq_n_s32(read<int32_t>(at))));
            low[m] = vdotq_s32(low[m], code, vreinterpretq_s8_s32(vdupq_n_s32(read<int32_t>(at + 32 * D - 32))));
          }
        }
        for (int m = 0; m < M; m++) {
          const int32x4_t both = D == 2 ? vaddq_s32(vshlq_n_s32(high[m], 8), low[m]) : low[m];
          sum[m][h] += (vf)vcvtq_f32_s32(both) * x.scale[(first + m) * tiles + t];
          if (h == 0) all[m] += x.sum[(first + m) * tiles + t];
        }
      }
    for (int h = 0; h < H; h++) {
      const Group group = scaling.next(a, b, g, h);
      for (int m = 0; m < M; m++) total[m][h] += group.of(a, sum[m][h], all[m]);
    }
  }
  for (int m = 0; m < M; m++) give(a, b, total[m], first + m, out);
}

template <int BITS, int D>
void byte_rows_of(const Linear& a, long from, long to, const Digits& x, long m, const Output& out) {
  for (long b = from; b < to; b++) {
    long i = 0;
    for (; i + 4 <= m; i += 4) byte_block<BITS, 4, D>(a, b, x, i, out);
    for (; i < m; i++) byte_block<BITS, 1, D>(a, b, x, i, out);
  }
}

template <int D>
void rows_in(const Linear& a, long from, long to, const Digits& x, long m, const Output& out) {
  of_width(a.bits, [&](auto width) { byte_rows_of<width.bits, D>(a, from, to, x, m, out); });
}

// What the offset of a code adds to a product with integers of this sum: those of 8 bits are stored without one.
inline int32_t offset(int bits, int32_t sum) { return bits == 8 ? 0 : (int32_t)(0u - ((uint32_t)sum << (bits - 1))); }

}  // namespace

bool byte_digits(const void* x, int type, long row, const Linear& a, const Digits& out) {
  const long tiles = a.tiles();
  double peaks = 0, rest = 0;  // squares
  bool small = false, finite = true;
  for (long t = 0; t < tiles; t++) {
    float v[32], peak = 0;
    load(x, type, row * a.k + 32 * t, v, 32);
    for (float f : v) {
      finite &= f - f == 0;
      if (fabsf(f) > peak) peak = fabsf(f);
    }
    if (!finite) return false;
    const float step = peak / 32639, by = peak == 0 ? 0 : 32639 / peak;  // 127 * 256 + 127
    small |= peak != 0 && peak < 1e-30f;
    int32_t whole[32], sum = 0;
    double square = 0;
    for (int i = 0; i < 32; i++) {
      whole[i] = vcvtns_s32_f32(v[i] * by);  // to nearest, ties to even
      sum += whole[i];
      if (fabsf(v[i]) < peak) square += (double)(v[i] * by) * (v[i] * by);
    }
    peaks += (double)peak * peak, rest += square * step * step;
    int8_t* at = out.digits + (row * tiles + t) * 64;
    for (int i = 0; i < 32; i++) {
      const int32_t w = whole[column(a.bits, i)];
      at[i] = (int8_t)((w + 128) >> 8), at[32 + i] = (int8_t)w;
    }
    out.scale[row * tiles + t] = step;
    out.less[row * tiles + t] = offset(a.bits, sum);
    out.sum[row * tiles + t] = (float)sum * step;
  }
  return !small && (rest == 0 || peaks * (31 / (12.0 * 32639 * 32639)) < 4e-8 * rest);  // as in vnni.cpp
}

void byte_int8(const Activations& x, long row, const Linear& a, float* room, const Digits& out) {
  const long tiles = a.tiles();
  load(x.x, x.type, row * a.k, room, a.k);
  for (long j = 0; j < x.left; j++) room[x.columns[j]] = 0;
  float most = 0, wrong = 0;  // NaN where one of them is not finite
  for (long i = 0; i < a.k; i++) {
    wrong += room[i] - room[i];
    if (fabsf(room[i]) > most) most = fabsf(room[i]);
  }
  const float least = 1.17549435e-38f * 127;
  const float scale = x.fixed ? *x.fixed : (most > least ? most : least) / 127, by = 1 / scale;
  for (long t = 0; t < tiles; t++) {
    int32_t whole[32], sum = 0;
    for (int i = 0; i < 32; i++) {
      const float v = room[32 * t + i] * by;
      whole[i] = vcvtns_s32_f32(v > 127 ? 127 : v < -127 ? -127 : v);
      sum += whole[i];
    }
    for (int i = 0; i < 32; i++) out.digits[(row * tiles + t) * 32 + i] = (int8_t)whole[column(a.bits, i)];
    out.scale[row * tiles + t] = scale + wrong;
    out.less[row * tiles + t] = offset(a.bits, sum);
    out.sum[row * tiles + t] = (float)sum * (scale + wrong);
  }
}

void byte_rows(const Linear& a, long from, long to, const Digits& x, long m, const Output& out) {
  if (x.each == 1) rows_in<1>(a, from, to, x, m, out);
  if (x.each == 2) rows_in<2>(a, from, to, x, m, out);
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
