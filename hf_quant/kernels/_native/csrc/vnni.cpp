// Products of bytes. Of x in bf16 or float16, a few rows: in every tile of 32 columns x becomes integers of 16 bits, less
// than 2^-16 of the largest from what it was, as two digits of eight bits; the products with codes are exact. Where
// activations are to be INT8, one digit and one scale for all tiles of a row.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#endif
#define SET_AVX2
#define SET_AVX512
#include "bytes.h"

namespace {

// Blocks b, ..., b + W - 1. Two at a time, two streams out of memory, are read faster than one.
template <int BITS, int M, int D, int W>
void block(const Linear& a, long b, const Digits& x, long first, const Output& out) {
  const long groups = a.groups(), steps = a.group / 32, tiles = a.tiles(), size = 64 * BITS, far = tiles * size;
  const uint8_t* tile = a.q + b * far;
  const long ahead = (BITS < 4 ? 64 : 48) / BITS;  // tiles that are fetched before they are needed
  Scaling scaling[2] = {Scaling(a), Scaling(a)};
  vf total[M][W] = {};
  for (long g = 0; g < groups; g++) {
    vf sum[M][W] = {};
    for (long t = g * steps; t < (g + 1) * steps; t++, tile += size) {
      const uint8_t* next = tile + ahead * size + (t + ahead < tiles ? 0 : (W - 1) * far);
#pragma GCC unroll 2
      for (int w = 0; w < W; w++)
#pragma GCC unroll 8
        for (int v = 0; v < BITS; v++) _mm_prefetch((const char*)next + w * far + 64 * v, _MM_HINT_T0);
      __m512i high[M][W], low[M][W];
#pragma GCC unroll 8
      for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int w = 0; w < W; w++) {
          if (D == 2) high[m][w] = _mm512_setzero_si512();
          low[m][w] = _mm512_set1_epi32(x.less[(first + m) * tiles + t]);
        }
#pragma GCC unroll 8
      for (int c = 0; c < 8; c++) {
        __m512i code[W];
#pragma GCC unroll 2
        for (int w = 0; w < W; w++) code[w] = codes<BITS>(tile + w * far, c);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
          const int8_t* at = x.digits + ((first + m) * tiles + t) * 32 * D + 4 * c;
          const __m512i more = _mm512_set1_epi32(read<int32_t>(at)), less = _mm512_set1_epi32(read<int32_t>(at + 32 * D - 32));
#pragma GCC unroll 2
          for (int w = 0; w < W; w++) {
            if (D == 2) high[m][w] = _mm512_dpbusd_epi32(high[m][w], code[w], more);
            low[m][w] = _mm512_dpbusd_epi32(low[m][w], code[w], less);
          }
        }
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int w = 0; w < W; w++) {
          const __m512i low_and_high = _mm512_add_epi32(_mm512_slli_epi32(high[m][w], 8), low[m][w]);
          sum[m][w] += (vf)_mm512_cvtepi32_ps(D == 2 ? low_and_high : low[m][w]) * x.scale[(first + m) * tiles + t];
        }
    }
    for (int w = 0; w < W; w++) {
      const Group group = scaling[w].next(a, b + w, g, 0);
      for (int m = 0; m < M; m++) {
        float all = 0;
        if (a.zero)
          for (long t = g * steps; t < (g + 1) * steps; t++) all += x.sum[(first + m) * tiles + t];
        total[m][w] += group.of(a, sum[m][w], all);
      }
    }
  }
  for (int w = 0; w < W; w++) {
    const long n = 16 * (b + w), count = a.n - n < 16 ? a.n - n : 16;
    for (int m = 0; m < M; m++) put(out, (first + m) * a.n + n, total[m][w], count);
  }
}

template <int BITS, int D, int W>
void blocks(const Linear& a, long b, const Digits& x, long m, const Output& out) {
  long i = 0;
  for (; i + 8 <= m; i += 8)
    for (int w = 0; w < W; w++) block<BITS, 8, D, 1>(a, b + w, x, i, out);
  for (; i + 4 <= m; i += 4) block<BITS, 4, D, W>(a, b, x, i, out);
  if (m - i == 3) block<BITS, 3, D, W>(a, b, x, i, out);
  if (m - i == 2) block<BITS, 2, D, W>(a, b, x, i, out);
  if (m - i == 1) block<BITS, 1, D, W>(a, b, x, i, out);
}

template <int BITS, int D>
void rows_of(const Linear& a, long from, long to, const Digits& x, long m, const Output& out) {
  for (; from + 2 <= to; from += 2) blocks<BITS, D, 2>(a, from, x, m, out);
  if (from < to) blocks<BITS, D, 1>(a, from, x, m, out);
}

}  // namespace

bool byte_digits(const void* x, int type, long row, const Linear& a, const Digits& out) {
  const long tiles = a.tiles();
  __m512i order[2];
  in_order(a.bits, order);
  double peaks = 0;  // squares
  __m512d others[2] = {};
  vf wrong = vf{};  // NaN where one of them is not finite
  bool small = false;
  for (long t = 0; t < tiles; t++) {
    const vf p = half_floats(x, type, row * a.k + 32 * t), q = half_floats(x, type, row * a.k + 32 * t + 16);
    const __m512 size[2] = {_mm512_abs_ps((__m512)p), _mm512_abs_ps((__m512)q)};
    const float peak = _mm512_reduce_max_ps(_mm512_max_ps(size[0], size[1])), step = peak / 32639;  // 127 * 256 + 127
    wrong += (p - p) + (q - q);
    small |= peak != 0 && peak < 1e-30f;
    const float by = peak == 0 ? 0 : 32639 / peak;
    const vf scaled[2] = {p * by, q * by};
    __m512i whole[2];
    __m512 square = _mm512_setzero_ps();
    for (int i = 0; i < 2; i++) {
      whole[i] = _mm512_cvtps_epi32((__m512)scaled[i]);
      const __mmask16 below = _mm512_cmp_ps_mask(size[i], _mm512_set1_ps(peak), _CMP_LT_OQ);
      square = _mm512_mask3_fmadd_ps((__m512)scaled[i], (__m512)scaled[i], square, below);
    }
    peaks += (double)peak * peak;
    for (int i = 0; i < 2; i++) {
      const __m512d half = _mm512_cvtps_pd(i ? _mm512_extractf32x8_ps(square, 1) : _mm512_castps512_ps256(square));
      others[i] = _mm512_fmadd_pd(half, _mm512_set1_pd((double)step * step), others[i]);
    }
    const int32_t sum = _mm512_reduce_add_epi32(_mm512_add_epi32(whole[0], whole[1]));  // anything where x is not finite
    int8_t* at = out.digits + (row * tiles + t) * 64;
    for (int i = 0; i < 2; i++) {
      const __m512i v = _mm512_permutex2var_epi32(whole[0], order[i], whole[1]);
      const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
      _mm_storeu_si128((__m128i*)(at + 16 * i), _mm512_cvtepi32_epi8(high));
      _mm_storeu_si128((__m128i*)(at + 32 + 16 * i), _mm512_cvtepi32_epi8(v));
    }
    out.scale[row * tiles + t] = step;
    out.less[row * tiles + t] = (int32_t)(0u - ((uint32_t)sum << (a.bits - 1)));
    out.sum[row * tiles + t] = (float)sum * step;
  }
  const double rest = _mm512_reduce_add_pd(_mm512_add_pd(others[0], others[1]));
  if (small || _mm512_reduce_add_ps((__m512)wrong) != 0) return false;
  // Rounding moves the 31 others of a tile by (peak / 32639)^2 / 12 each, as a square. Where the weights at the peaks are
  // zero, that must still be less than 2e-4 of what is left, as a norm: no more than what rounding to float16 does.
  return rest == 0 || peaks * (31 / (12.0 * 32639 * 32639)) < 4e-8 * rest;
}

void byte_int8(const Activations& x, long row, const Linear& a, float* room, const Digits& out) {
  const long tiles = a.tiles();
  __m512i order[2];
  in_order(a.bits, order);
  int8_t* at = out.digits + row * tiles * 32;
  const float scale = int8_row(
      x, row, a.k, order, room, [at]() mutable { return (at += 32) - 32; },
      [=](long t, int32_t sum) {
        out.less[row * tiles + t] = -sum * (1 << (a.bits - 1));
        out.sum[row * tiles + t] = (float)sum;
      });
  for (long t = 0; t < tiles; t++) out.scale[row * tiles + t] = scale, out.sum[row * tiles + t] *= scale;
}

namespace {

template <int D>
void rows_in(const Linear& a, long from, long to, const Digits& x, long m, const Output& out) {
  of_width(a.bits, [&](auto width) { rows_of<width.bits, D>(a, from, to, x, m, out); });
}

}  // namespace

void byte_rows(const Linear& a, long from, long to, const Digits& x, long m, const Output& out) {
  if (x.each == 1) rows_in<1>(a, from, to, x, m, out);
  if (x.each == 2) rows_in<2>(a, from, to, x, m, out);
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
