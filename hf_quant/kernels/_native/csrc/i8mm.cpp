// Products of bytes on ARM, where the processor has SMMLA (ARMv8.6, or i8mm before it): two rows of x by two of a weight at once.
#if defined(__aarch64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod,i8mm"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod+i8mm")
#endif
#include "arm_codes.h"

namespace {

// Eight columns of two rows of x; of the last one twice where there is no other.
inline int8x16_t two_rows(const int8_t* at, long stride) { return vcombine_s8(vld1_s8(at), vld1_s8(at + stride)); }

// The numbers of one of two rows of x, by four rows of a weight.
inline int32x4_t row_of(const int32x4_t* pairs, int row) {
  return row ? vcombine_s32(vget_high_s32(pairs[0]), vget_high_s32(pairs[1])) : vcombine_s32(vget_low_s32(pairs[0]), vget_low_s32(pairs[1]));
}

// Rows first, ..., first + 2 PAIRS - 1 of m, less those that there are not.
template <int BITS, int PAIRS, int D>
void matrix_block(const Linear& a, long b, const Digits& x, long first, long m, const Output& out) {
  const long groups = a.groups(), steps = a.group / 32, tiles = a.tiles(), bytes = tiles * 32 * D;
  const int M = 2 * PAIRS;
  const uint8_t* tile = a.q + b * tiles * 64 * BITS;
  long row[M];
  for (int i = 0; i < M; i++) row[i] = first + i < m ? first + i : m - 1;
  Scaling scaling(a);
  vf total[M][H] = {};
  for (long g = 0; g < groups; g++) {
    vf sum[M][H] = {};
    float all[M] = {};
    for (long t = g * steps; t < (g + 1) * steps; t++, tile += 64 * BITS)
      for (int h = 0; h < H; h++) {
        int32x4_t high[PAIRS][2], low[PAIRS][2];  // by the first two rows of the weight, and by the others
        for (int p = 0; p < PAIRS; p++)
          for (int w = 0; w < 2; w++) {
            high[p][w] = vdupq_n_s32(0);
            low[p][w] = vcombine_s32(vdup_n_s32(x.less[row[2 * p] * tiles + t]), vdup_n_s32(x.less[row[2 * p + 1] * tiles + t]));
          }
#pragma GCC unroll 4
        for (int c = 0; c < 8; c += 2) {
          const int32x4_t one = vreinterpretq_s32_s8(codes<BITS>(tile, c, h)), two = vreinterpretq_s32_s8(codes<BITS>(tile, c + 1, h));
          const int8x16_t code[] = {vreinterpretq_s8_s32(vzip1q_s32(one, two)), vreinterpretq_s8_s32(vzip2q_s32(one, two))};
#pragma GCC unroll 2
          for (int p = 0; p < PAIRS; p++) {
            const int8_t* at = x.digits + (row[2 * p] * tiles + t) * 32 * D + 4 * c;
            const long stride = (row[2 * p + 1] - row[2 * p]) * bytes;
#pragma GCC unroll 2
            for (int w = 0; w < 2; w++) {
              if (D == 2) high[p][w] = vmmlaq_s32(high[p][w], two_rows(at, stride), code[w]);
              low[p][w] = vmmlaq_s32(low[p][w], two_rows(at + 32 * D - 32, stride), code[w]);
            }
          }
        }
        for (int i = 0; i < M; i++) {
          const int32x4_t last = row_of(low[i / 2], i % 2);
          const int32x4_t both = D == 2 ? vaddq_s32(vshlq_n_s32(row_of(high[i / 2], i % 2), 8), last) : last;
          sum[i][h] += (vf)vcvtq_f32_s32(both) * x.scale[row[i] * tiles + t];
          if (h == 0) all[i] += x.sum[row[i] * tiles + t];
        }
      }
    for (int h = 0; h < H; h++) {
      const Group group = scaling.next(a, b, g, h);
      for (int i = 0; i < M; i++) total[i][h] += group.of(a, sum[i][h], all[i]);
    }
  }
  for (int i = 0; i < M && first + i < m; i++) give(a, b, total[i], first + i, out);
}

template <int D>
void rows_in(const Linear& a, long from, long to, const Digits& x, long m, const Output& out) {
  of_width(a.bits, [&](auto width) {
    for (long b = from; b < to; b++) {
      long i = 0;
      for (; i + 2 < m; i += 4) matrix_block<width.bits, 2, D>(a, b, x, i, m, out);
      if (i < m) matrix_block<width.bits, 1, D>(a, b, x, i, m, out);
    }
  });
}

}  // namespace

void matrix_rows(const Linear& a, long from, long to, const Digits& x, long m, const Output& out) {
  if (x.each == 1) rows_in<1>(a, from, to, x, m, out);
  if (x.each == 2) rows_in<2>(a, from, to, x, m, out);
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
