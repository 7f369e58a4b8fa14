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
#include "vector.h"

namespace {

const long BLOCKS = 8;  // blocks of W that a part of x stays in the second-level cache for
const long AHEAD = 32;   // pairs of x that are fetched before they are needed

// Columns of a chunk that are multiplied before what they add is scaled.
struct Part {
  long pairs, group;
  vf scale[2], shift[2];
  bool shifted;
};

// Codes of two blocks that are fetched while others are multiplied, some bytes on with every pair of columns.
struct Ahead {
  const char* at[2];
  long step;
};

// c [T, 2, 16] += rows of x, in pairs of columns, times the columns of two blocks.
template <int T>
void multiplied(const uint8_t* w, const uint32_t* x, const Part* part, long parts, const float* sums, long groups, float* c,
                Ahead ahead) {
  for (; parts; parts--, part++) {
    __m512 sum[T][2];
#pragma GCC unroll 14
    for (int m = 0; m < T; m++) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
    for (long p = 0; p < part->pairs; p++, w += 128, x += T) {
      _mm_prefetch((const char*)(x + AHEAD * T), _MM_HINT_T0);
      for (int i = 0; i < 2; i++) _mm_prefetch(ahead.at[i], _MM_HINT_T0), ahead.at[i] += ahead.step;
      const __m512bh one = (__m512bh)_mm512_load_si512(w), other = (__m512bh)_mm512_load_si512(w + 64);
#pragma GCC unroll 14
      for (int m = 0; m < T; m++) {
        const __m512bh both = (__m512bh)_mm512_set1_epi32((int)x[m]);
        sum[m][0] = _mm512_dpbf16_ps(sum[m][0], one, both);
        sum[m][1] = _mm512_dpbf16_ps(sum[m][1], other, both);
      }
    }
    const vf scale[2] = {part->scale[0], part->scale[1]};
#pragma GCC unroll 14
    for (int m = 0; m < T; m++)
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) {
        const vf made = read<vf>(c + 32 * m + 16 * i) + (vf)sum[m][i] * scale[i];
        _mm512_store_ps(c + 32 * m + 16 * i, (__m512)made);
      }
    if (!part->shifted) continue;
    for (int m = 0; m < T; m++)
      for (int i = 0; i < 2; i++) {
        const vf made = read<vf>(c + 32 * m + 16 * i) + part->shift[i] * sums[m * groups + part->group];
        _mm512_store_ps(c + 32 * m + 16 * i, (__m512)made);
      }
  }
}

typedef void (*Multiply)(const uint8_t*, const uint32_t*, const Part*, long, const float*, long, float*, Ahead);
const Multiply MULTIPLY[] = {multiplied<1>, multiplied<2>, multiplied<3>, multiplied<4>,  multiplied<5>,  multiplied<6>,
                             multiplied<7>, multiplied<8>, multiplied<9>, multiplied<10>, multiplied<11>, multiplied<12>,
                             multiplied<13>, multiplied<14>};

// Two vectors of float32 to pairs of bf16.
inline __m512i pairs(vf low, vf high) {
  const __m256i one = (__m256i)_mm512_cvtneps_pbh((__m512)low), other = (__m256i)_mm512_cvtneps_pbh((__m512)high);
  return _mm512_or_si512(_mm512_cvtepu16_epi32(one), _mm512_slli_epi32(_mm512_cvtepu16_epi32(other), 16));
}

// 32 numbers, or the first of them where a row of the output ends.
inline void rounded(const float* from, uint16_t* to, long count) {
  const __m512i made = (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(from + 16), _mm512_load_ps(from));
  _mm512_mask_storeu_epi16(to, count < 32 ? (1u << count) - 1 : ~0u, made);
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

// A chunk of block b, its i-th of two.
template <int BITS>
void chunk(const Linear& a, long b, long t0, long count, int i, bool scaled, uint8_t* out) {
  const long groups = a.groups(), steps = a.group / 32;
  const uint8_t* tile = a.q + (b * a.tiles() + t0) * 64 * BITS;
  Scaling scaling(a);
  if (scaled) scaling.widen(a, b * groups + t0 / steps, (t0 + count - 1) / steps - t0 / steps + 1);
  out += 64 * i;
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

// How a chunk of two blocks is scaled; the number of its parts.
long parted(const Linear& a, long b, long other, long t0, long count, bool scaled, Part* part) {
  const long groups = a.groups(), steps = a.group / 32;
  if (scaled) {
    part[0] = {16 * count, 0, {splat(1), splat(1)}, {}, false};
    return 1;
  }
  Scaling scaling[2] = {Scaling(a), Scaling(a)};
  for (int i = 0; i < 2; i++)
    scaling[i].widen(a, (i ? other : b) * groups + t0 / steps, (t0 + count - 1) / steps - t0 / steps + 1);
  long parts = 0;
  for (long t = t0; t < t0 + count; parts++, part++) {
    const long g = t / steps, to = (g + 1) * steps < t0 + count ? (g + 1) * steps : t0 + count;
    part->pairs = 16 * (to - t), part->group = g, part->shifted = a.zero && t == g * steps;
    for (int i = 0; i < 2; i++) {
      const Group group = scaling[i].group(a, (i ? other : b) * groups + g, 0);
      part->scale[i] = group.scale, part->shift[i] = group.shift(a);
    }
    t = to;
  }
  return parts;
}

template <int BITS>
void linear(const Linear& a, long from, long to, const RowTiles& x, uint8_t* room, const Output& out) {
  const long all = x.tiles(), size = x.tall * 32, groups = a.groups();
  const bool scaled = x.scaled;
  const Multiply multiply = MULTIPLY[x.tall - 1];
  uint8_t* w = room;
  float* c = (float*)(room + x.chunk * 32 * 64);  // [BLOCKS / 2][tiles][tall][2][16]
  Part part[16];
  for (long b = from; b < to; b += BLOCKS) {
    const long blocks = to - b < BLOCKS ? to - b : BLOCKS, twos = (blocks + 1) / 2;
    memset(c, 0, sizeof(float) * twos * all * size);
    for (long t0 = 0; t0 < a.tiles(); t0 += x.chunk) {
      const long count = a.tiles() - t0 < x.chunk ? a.tiles() - t0 : x.chunk;
      for (long i = 0; i < twos; i++) {  // with an odd number of blocks, the last is multiplied twice
        const long one = b + 2 * i, other = one + 1 < to ? one + 1 : one;
        chunk<BITS>(a, one, t0, count, 0, scaled, w);
        chunk<BITS>(a, other, t0, count, 1, scaled, w);
        const long parts = parted(a, one, other, t0, count, scaled, part);
        const bool last = i + 1 == twos;  // then the first two blocks are next, a chunk on
        const long bytes = 64 * BITS, next = (last ? b : one + 2) * a.tiles() + (last ? t0 + x.chunk : t0);
        const char* codes = (const char*)a.q + next * bytes;
        const long far = a.tiles() * bytes, each = (count * bytes + all - 1) / all, step = (each + 16 * count - 1) / (16 * count);
        for (long j = 0; j < all; j++)
          multiply(w, x.at(t0, count, j), part, parts, x.sums + j * x.tall * groups, groups, c + (i * all + j) * size,
                   {{codes + j * each, codes + j * each + far}, step});
      }
    }
    for (long m = 0; m < x.m; m++)
      for (long i = 0; i < twos; i++) {
        const long n = 16 * (b + 2 * i), end = 16 * to < a.n ? 16 * to : a.n;
        rounded(c + i * all * size + 32 * m, (uint16_t*)out.y + m * a.n + n, end - n);
      }
  }
}

}  // namespace

size_t bf16_room(const RowTiles& x) { return x.chunk * 32 * 64 + sizeof(float) * BLOCKS / 2 * x.tiles() * x.tall * 32; }

void bf16_pack(const uint16_t* x, const Linear& a, long tile, const RowTiles& out) {
  const long groups = a.groups();
  for (long t0 = 0; t0 < a.tiles(); t0 += out.chunk) {
    const long count = a.tiles() - t0 < out.chunk ? a.tiles() - t0 : out.chunk;
    for (long i = 0; i < out.tall; i++) {
      const long row = tile * out.tall + i;
      uint32_t* to = out.at(t0, count, tile) + i;
      if (row < out.m) {
        const uint32_t* from = (const uint32_t*)(x + row * a.k + 32 * t0);
        for (long p = 0; p < 16 * count; p++) to[p * out.tall] = from[p];
      } else {
        for (long p = 0; p < 16 * count; p++) to[p * out.tall] = 0;
      }
    }
  }
  if (!a.zero || out.scaled) return;
  for (long i = 0; i < out.tall && tile * out.tall + i < out.m; i++)
    for (long g = 0; g < groups; g++) {
      const uint16_t* from = x + (tile * out.tall + i) * a.k + g * a.group;
      vf sum = vf{};
      for (long j = 0; j < a.group; j += 16) sum += (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(read<__m256i>(from + j)), 16);
      out.sums[(tile * out.tall + i) * groups + g] = _mm512_reduce_add_ps((__m512)sum);
    }
}

void bf16_linear(const Linear& a, long from, long to, const RowTiles& x, uint8_t* room, const Output& out) {
  of_width(a.bits, [&](auto width) { linear<width.bits>(a, from, to, x, room, out); });
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
