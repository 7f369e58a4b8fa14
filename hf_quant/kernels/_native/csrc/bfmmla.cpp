// Many rows of x in bf16 on ARM, where the processor has BFMMLA (ARMv8.6, or bf16 before it): two rows of x by two of a weight at
// once, four columns of them. Some columns of a block of W become bf16, scales and all, a panel that stays in the first-level cache,
// and are multiplied by all rows.
#if defined(__aarch64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("bf16"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+bf16")
#endif
#include "vector.h"

namespace {

const int FOUR = 64;      // numbers of a panel in four of its columns: eight pairs of rows
const long TOGETHER = 2;  // pairs of rows of x that are multiplied together: with three, GCC keeps sums in memory

// The rows of four columns [4][4], two of them in a vector.
inline void turned(const vf* column, bfloat16x8_t* pair) {
  const float32x4_t a = vzip1q_f32((float32x4_t)column[0], (float32x4_t)column[2]);
  const float32x4_t b = vzip2q_f32((float32x4_t)column[0], (float32x4_t)column[2]);
  const float32x4_t c = vzip1q_f32((float32x4_t)column[1], (float32x4_t)column[3]);
  const float32x4_t d = vzip2q_f32((float32x4_t)column[1], (float32x4_t)column[3]);
  pair[0] = vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(vzip1q_f32(a, c)), vzip2q_f32(a, c));
  pair[1] = vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(vzip1q_f32(b, d)), vzip2q_f32(b, d));
}

// Tiles t0, ..., t0 + count - 1 of block b: [four columns][pair of rows][2][4].
template <int BITS>
void expand(const Linear& a, long b, long t0, long count, uint16_t* out) {
  const long steps = a.group / 32;
  const uint8_t* tile = a.q + (b * a.tiles() + t0) * 64 * BITS;
  const long first = b * a.groups() + t0 / steps;
  Scaling scaling(a);
  scaling.widen(a, first, (t0 + count - 1) / steps - t0 / steps + 1);
  for (long t = t0; t < t0 + count; t++, tile += 64 * BITS, out += 8 * FOUR)
    for (int h = 0; h < H; h++) {
      const Group group = scaling.group(a, b * a.groups() + t / steps, h);
      const vf scale = group.scale, shift = group.shift(a);
      vf column[32];
      each_pair<BITS>(tile, h, [&](int r, vf low, vf high) __attribute__((always_inline)) {
        column[2 * r] = low * scale + shift, column[2 * r + 1] = high * scale + shift;
      });
      for (int c = 0; c < 8; c++) {
        bfloat16x8_t pair[2];
        turned(column + 4 * c, pair);
        memcpy(out + FOUR * c + 16 * h, pair, sizeof pair);
      }
    }
}

// c [2 T, 16] += T pairs of rows of x times some columns of a panel.
template <int T>
void multiplied(const uint16_t* w, const uint16_t* x, long columns, float* c) {
  float32x4_t sum[T][8];
#pragma GCC unroll 2
  for (int i = 0; i < T; i++)
#pragma GCC unroll 8
    for (int v = 0; v < 8; v++) sum[i][v] = vdupq_n_f32(0);
  for (long p = 0; p < columns; p += 4, w += FOUR, x += 8) {
    bfloat16x8_t rows[T];
#pragma GCC unroll 2
    for (int i = 0; i < T; i++) rows[i] = read<bfloat16x8_t>(x + 2 * COLUMNS * i);
#pragma GCC unroll 8
    for (int v = 0; v < 8; v++) {
      const bfloat16x8_t pair = read<bfloat16x8_t>(w + 8 * v);
#pragma GCC unroll 2
      for (int i = 0; i < T; i++) sum[i][v] = vbfmmlaq_f32(sum[i][v], rows[i], pair);
    }
  }
#pragma GCC unroll 2
  for (int i = 0; i < T; i++)
#pragma GCC unroll 4
    for (int v = 0; v < 8; v += 2) {
      float* const at = c + 32 * i + 2 * v;
      vst1q_f32(at, vaddq_f32(vld1q_f32(at), vcombine_f32(vget_low_f32(sum[i][v]), vget_low_f32(sum[i][v + 1]))));
      vst1q_f32(at + 16, vaddq_f32(vld1q_f32(at + 16), vcombine_f32(vget_high_f32(sum[i][v]), vget_high_f32(sum[i][v + 1]))));
    }
}

template <int BITS>
void panels_of(const Linear& a, long from, long to, const RowPairs& x, uint8_t* room, const Output& out) {
  const long size = 2 * x.pairs() * 16;
  uint16_t* const w = (uint16_t*)room;
  float* const c = (float*)(room + sizeof(uint16_t) * 16 * COLUMNS);  // [BLOCKS][2 * pairs][16]
  for (long b = from; b < to; b += BLOCKS) {
    const long end = to - b < BLOCKS ? to : b + BLOCKS;
    memset(c, 0, sizeof(float) * (end - b) * size);
    for (long chunk = 0; chunk * COLUMNS < a.k; chunk++) {
      const long t0 = chunk * COLUMNS / 32, most = a.tiles() - t0, count = most < COLUMNS / 32 ? most : COLUMNS / 32;
      for (long one = b; one < end; one++) {
        expand<BITS>(a, one, t0, count, w);
        float* const to_rows = c + (one - b) * size;
        for (long i = 0; i < x.pairs(); i += TOGETHER) {
          const auto multiply = i + 1 == x.pairs() ? multiplied<1> : multiplied<2>;
          multiply(w, x.at(chunk, i), 32 * count, to_rows + 32 * i);
        }
      }
    }
    for (long one = b; one < end; one++)
      for (long i = 0; i < x.m; i++)
        for (int h = 0; h < H; h++)
          put(out, i * a.n + 16 * one + L * h, read<vf>(c + (one - b) * size + 16 * i + L * h), a.n - 16 * one - L * h);
  }
}

}  // namespace

void pairs_spread(const uint16_t* x, long k, long row, const RowPairs& out) {
  for (long j = 0; j < k; j += 4)
    memcpy(out.at(j / COLUMNS, row / 2) + 2 * (j % COLUMNS) + row % 2 * 4, x + row * k + j, 8);
}

void pairs_panels(const Linear& a, long from, long to, const RowPairs& x, uint8_t* room, const Output& out) {
  of_width(a.bits, [&](auto width) { panels_of<width.bits>(a, from, to, x, room, out); });
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
