// Many rows of x in float32. Some columns of one or two blocks of W become float32, a panel that stays in the first-level cache,
// and are multiplied by all rows. Included by the units whose vectors it uses.
#pragma once
#include "vector.h"

namespace {

#if defined(SET_AVX512)
const long PANEL = 2, TALLEST = 14;  // blocks of a panel; rows that are multiplied together: as many as registers hold sums of
#elif defined(SET_AVX2)
const long PANEL = 1, TALLEST = 6;
#elif defined(__aarch64__)
const long PANEL = 1, TALLEST = 6;
#else
const long PANEL = 1, TALLEST = 3;
#endif
const int V = PANEL * H;  // vectors that hold one column of a panel
const long ACROSS = PANEL * 16;
const long NEAR = 512 << 10;  // bytes of x up to which it stays in the second-level cache while all of its columns are multiplied

// c [T, ACROSS] += T rows of x, COLUMNS apart, times some columns of a panel.
template <int T>
void multiplied(const float* w, const float* x, long columns, float* c) {
  vf sum[T][V] = {};
  for (long p = 0; p < columns; p++, w += ACROSS) {
    vf column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) column[v] = read<vf>(w + L * v);
    __builtin_prefetch(x + T * (COLUMNS + p));  // of the rows that follow
#pragma GCC unroll 14
    for (int m = 0; m < T; m++) {
      const vf one = splat(x[m * COLUMNS + p]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sum[m][v] += column[v] * one;
    }
  }
#pragma GCC unroll 14
  for (int m = 0; m < T; m++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const vf total = read<vf>(c + m * ACROSS + L * v) + sum[m][v];
      memcpy(c + m * ACROSS + L * v, &total, sizeof total);
    }
}

typedef void (*Multiply)(const float*, const float*, long, float*);
const Multiply MULTIPLY[] = {
    multiplied<1>, multiplied<2>, multiplied<3>,
#if defined(SET_AVX2) || defined(__aarch64__)
    multiplied<4>, multiplied<5>, multiplied<6>,
#endif
#if defined(SET_AVX512)
    multiplied<7>, multiplied<8>, multiplied<9>, multiplied<10>, multiplied<11>, multiplied<12>, multiplied<13>, multiplied<14>,
#endif
};

// Columns of a tile, one every ACROSS numbers. SHIFTED: zero points are subtracted from codes.
template <int BITS, bool SHIFTED>
inline void expanded(const uint8_t* tile, const Group* group, float* out) {
  for (int h = 0; h < H; h++) {
    const vf scale = group[h].scale, zero = group[h].zero;
    each_pair<BITS>(tile, h, [&](int r, vf low, vf high) __attribute__((always_inline)) {
      const vf even = SHIFTED ? (low - zero) * scale : low * scale + zero;
      const vf odd = SHIFTED ? (high - zero) * scale : high * scale + zero;
      memcpy(out + 2 * r * ACROSS + L * h, &even, sizeof even);
      memcpy(out + (2 * r + 1) * ACROSS + L * h, &odd, sizeof odd);
    });
  }
}

// Tiles t0, ..., t0 + count - 1 of block b.
template <int BITS>
void expand(const Linear& a, long b, long t0, long count, float* out) {
  const long groups = a.groups(), steps = a.group / 32;
  const uint8_t* tile = a.q + (b * a.tiles() + t0) * 64 * BITS;
  long g = b * groups + t0 / steps, left = steps - t0 % steps;
  Scaling scaling(a);
  scaling.widen(a, g, (t0 + count - 1) / steps - t0 / steps + 1);
  Group group[H];
  for (long t = 0; t < count; t++, tile += 64 * BITS, out += 32 * ACROSS) {
    if (left == 0) g++, left = steps;
    if (t == 0 || left == steps)
      for (int h = 0; h < H; h++) {
        group[h] = scaling.group(a, g, h);
        if (!a.zero) group[h].zero = vf{};
      }
    left--;
    if (a.zero && !a.subtracted)
      expanded<BITS, true>(tile, group, out);
    else
      expanded<BITS, false>(tile, group, out);
  }
}

// Codes of a panel that are fetched while another is multiplied, a part with every few rows.
struct Ahead {
  const uint8_t* at[PANEL];
  long bytes;
  void fetch(long i, long parts) const {
    for (long j = bytes * i / parts / 64 * 64; j < bytes * (i + 1) / parts; j += 64)
      for (const uint8_t* block : at) __builtin_prefetch(block + j);
  }
};

// c [m, ACROSS] += some columns of all rows times a panel.
inline void panel(const float* w, const FloatRows& x, long chunk, long columns, float* c, const Ahead& ahead) {
  const long parts = (x.m + TALLEST - 1) / TALLEST;
  for (long i = 0; i < parts; i++) {
    const long row = x.m * i / parts, count = x.m * (i + 1) / parts - row;
    ahead.fetch(i, parts);
    MULTIPLY[count - 1](w, x.at(chunk, row), columns, c + row * ACROSS);
  }
}

// c [m, ACROSS] as columns of the output, from block b on.
inline void finish(const Linear& a, long b, long end, const float* c, long m, const Output& out) {
  for (long i = 0; i < m; i++)
    for (int v = 0; v < V; v++) {
      const long n = 16 * b + L * v, left = (16 * end < a.n ? 16 * end : a.n) - n;
      put(out, i * a.n + n, read<vf>(c + i * ACROSS + L * v), left);
    }
}

template <int BITS>
void panels_of(const Linear& a, long from, long to, const FloatRows& x, float* room, const Output& out) {
  const long blocks = x.m * a.k * (long)sizeof(float) <= NEAR ? PANEL : BLOCKS, size = x.m * ACROSS;
  float *w = room, *c = room + COLUMNS * ACROSS;  // [BLOCKS / PANEL][m][ACROSS]
  for (long b = from; b < to; b += blocks) {
    const long end = to - b < blocks ? to : b + blocks;
    memset(c, 0, sizeof(float) * ((end - b + PANEL - 1) / PANEL * size));
    for (long chunk = 0; chunk * COLUMNS < a.k; chunk++) {
      const long t0 = chunk * COLUMNS / 32, most = a.tiles() - t0, count = most < COLUMNS / 32 ? most : COLUMNS / 32;
      for (long one = b; one < end; one += PANEL) {  // with an odd number of blocks, the last is multiplied twice
        const bool last = one + PANEL >= end;        // then the first blocks are next, a chunk on
        Ahead ahead;
        ahead.bytes = count * 64 * BITS;
        for (int i = 0; i < PANEL; i++) {
          expand<BITS>(a, one + i < to ? one + i : one, t0, count, w + 16 * i);
          ahead.at[i] = a.q + (((last ? b : one + PANEL) + i) * a.tiles() + (last ? t0 + count : t0)) * 64 * BITS;
        }
        panel(w, x, chunk, 32 * count, c + (one - b) / PANEL * size, ahead);
      }
    }
    for (long one = b; one < end; one += PANEL) finish(a, one, end, c + (one - b) / PANEL * size, x.m, out);
  }
}

[[maybe_unused]] void panels(const Linear& a, long from, long to, const FloatRows& x, float* room, const Output& out) {
  of_width(a.bits, [&](auto width) { panels_of<width.bits>(a, from, to, x, room, out); });
}

// One row of x, spread over the chunks.
[[maybe_unused]] void spread(const void* x, int type, long k, long row, const FloatRows& out) {
  of_type(type, [&](auto kind) {
    for (long j = 0; j < k; j += L) {
      const vf v = numbers<kind.bits>(x, row * k + j);
      memcpy(out.at(j / COLUMNS, row) + j % COLUMNS, &v, sizeof v);
    }
  });
}

}  // namespace
