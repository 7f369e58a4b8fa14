// Many rows of int8 activations: AMX multiplies tiles of bytes. Codes of eight bits lie as it wants them; narrower ones are
// widened, a part of W at a time, into what stays in the first- and second-level caches. Sums within a group are exact.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,amx-tile,amx-int8"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,amx-tile,amx-int8")
#endif
#define SET_AVX2
#define SET_AVX512
#include "amx.h"
#include "bytes.h"

namespace {

const int32_t NUMBERS[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                             16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

template <class P>
inline void blank(long tiles, P next) {
  for (long t = 0; t < tiles; t++) memset(next(), 0, 32);
}

// A tile of 32 columns to signed bytes.
template <int BITS>
inline void widened(const uint8_t* tile, uint8_t* out) {
  const __m512i half = _mm512_set1_epi8(1 << (BITS - 1));
#pragma GCC unroll 8
  for (int c = 0; c < 8; c++) _mm512_store_si512(out + 64 * c, _mm512_sub_epi8(codes<BITS>(tile, c), half));
}

// sums [2][2] of 16 x 16, as in amx.cpp: x tiles at a (and a + below) times W tiles at b (and b + beside).
template <int TALL>
void multiplied(const int8_t* a, size_t below, const uint8_t* b, size_t beside, long unit, long count, int32_t* c, size_t right,
                size_t down, bool first) {
  sums_in<TALL>(c, right, down, first);
  for (long t = 0; t < count; t++, a += 16 * unit, b += 16 * unit) {
    _tile_loadd(4, a, unit);
    _tile_loadd(6, b, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, b + beside, 64);
    _tile_dpbssd(1, 4, 7);
    if (TALL == 2) {
      _tile_loadd(5, a + below, unit);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
  }
  sums_out<TALL>(c, right, down);
}

inline vf floats(const int32_t* from) { return (vf)_mm512_cvtepi32_ps(_mm512_loadu_si512(from)); }

// c [16, 16] += a tile of integers of one group.
inline void added(const int32_t* product, const Group group, bool zeros, const float* sums, long groups, float* c, bool first) {
  for (int i = 0; i < 16; i++) {
    const vf made = floats(product + 16 * i), all = (zeros ? made - group.zero * sums[i * groups] : made) * group.scale;
    _mm512_storeu_ps(c + 16 * i, (__m512)(first ? all : all + read<vf>(c + 16 * i)));
  }
}

struct Panel {  // some blocks of W, some of its columns
  const uint8_t* at;
  size_t beside;  // to the next block
};

template <int BITS>
Panel panel(const Linear& a, long b, long blocks, long t0, long count, uint8_t* room) {  // in tiles of 32 columns
  if (BITS == 8) return {a.q + (b * a.tiles() + t0) * 512, (size_t)a.tiles() * 512};
  for (long i = 0; i < blocks; i++) {
    const uint8_t* tile = a.q + ((b + i) * a.tiles() + t0) * 64 * BITS;
    for (long t = 0; t < count; t++, tile += 64 * BITS) {
      for (int v = 0; v < BITS; v++) _mm_prefetch((const char*)tile + 64 * v + 2048, _MM_HINT_T0);
      widened<BITS == 8 ? 4 : BITS>(tile, room + (i * count + t) * 512);
    }
  }
  return {room, (size_t)count * 512};
}

// Units multiplied before the next: what stays in the first-level cache for two blocks, and whole groups.
inline long units(const Linear& a) {
  const long some = 512 / int8_unit(a), each = a.group / int8_unit(a);
  return a.groups() == 1 ? some : each >= some ? each : some / each * each;
}

// Two by two tiles of sums (of integers, or of floats where there are groups) to the output.
void finish(const Linear& a, const Scaling* scaling, long b, long blocks, long row, long m, const int32_t* c, size_t right,
            size_t down, const Int8Tiles& x, const Output& out) {
  const bool whole = a.groups() == 1;
  Group group[2] = {};
  for (long q = 0; whole && q < blocks; q++) group[q] = scaling[q].group(a, b + q, 0);
  for (long i = 0; i < 32 && row + i < m; i++)
    for (long q = 0; q < blocks; q++) {
      const int32_t* at = c + q * right + i / 16 * down + i % 16 * 16;
      const long n = 16 * (b + q), left = a.n - n < 16 ? a.n - n : 16;
      const vf made = whole ? group[q].of(a, floats(at), x.sum[row + i]) : read<vf>(at);
      put(out, (row + i) * a.n + n, made * x.scale[row + i], left);
    }
}

template <int BITS>
void linear(const Linear& a, long from, long to, const Int8Tiles& x, long m, uint8_t* room, const Output& out) {
  const long unit = x.unit, m_tiles = x.m_tiles, all = a.k / unit, depth = units(a), groups = a.groups();
  const long each = groups == 1 ? depth : a.group / unit;
  const size_t step = 16 * unit, right = 256, down = 512;  // bytes of a tile; numbers between tiles of sums
  int32_t* c = (int32_t*)room;  // [WIDE / 2][m_tiles / 2][2][2] tiles: integers, or floats where there are groups
  int32_t* one = c + WIDE * (m_tiles + 1) * 256;
  uint8_t* w = (uint8_t*)(one + 4 * 256);
  Scaling scaling[2] = {Scaling(a), Scaling(a)};
  configure(m, (int)unit);
  for (long b = from; b < to; b += WIDE) {
    const long blocks = to - b < WIDE ? to - b : WIDE;
    for (long u0 = 0; u0 < all; u0 += depth) {
      const long count = all - u0 < depth ? all - u0 : depth;
      const Panel p = panel<BITS>(a, b, blocks, u0 * unit / 32, count * unit / 32, w);
      BARRIER;
      for (long i = 0; i < blocks; i += 2) {  // with an odd number of blocks, the last is multiplied twice
        const size_t beside = i + 1 < blocks ? p.beside : 0;
        const long pair = i + 1 < blocks ? 2 : 1;
        for (long q = 0; q < pair; q++)  // at most 16 groups, those of `units`
          scaling[q].widen(a, (b + i + q) * groups + (groups == 1 ? 0 : u0 / each), groups == 1 ? 1 : (count + each - 1) / each);
        for (long j = 0; j < m_tiles; j += 2) {
          int32_t* sums = c + (i / 2 * ((m_tiles + 1) / 2) + j / 2) * 1024;
          for (long s = 0; s < count; s += each) {
            const long some = count - s < each ? count - s : each, g = (u0 + s) / each;
            const int8_t* rows = x.codes + (u0 * m_tiles + j * depth + s) * step;
            const uint8_t* columns = p.at + i * p.beside + s * step;
            int32_t* made = groups == 1 ? sums : one;
            const bool fresh = groups > 1 || u0 == 0;
            if (j + 1 < m_tiles)
              multiplied<2>(rows, depth * step, columns, beside, unit, some, made, right, down, fresh);
            else
              multiplied<1>(rows, depth * step, columns, beside, unit, some, made, right, down, fresh);
            BARRIER;
            for (long q = 0; groups > 1 && q < pair; q++)
              for (long r = 0; r < 2 && j + r < m_tiles; r++)
                added(one + r * down + q * right, scaling[q].group(a, (b + i + q) * groups + g, 0), a.zero, x.sum + (j + r) * 16 * groups + g, groups,
                      (float*)sums + r * down + q * right, g == 0);
          }
          if (u0 + count == all) finish(a, scaling, b + i, pair, 16 * j, m, sums, right, down, x, out);
        }
      }
    }
  }
  _tile_release();
}

}  // namespace

size_t int8_tiles(const Linear& a, long m_tiles) {
  const long depth = units(a) * int8_unit(a);
  return (size_t)((a.k + depth - 1) / depth * depth * 16 * m_tiles);
}

size_t int8_room(const Linear& a, long m_tiles) {
  return (WIDE * (m_tiles + 1) + 4) * 1024 + WIDE * units(a) * int8_unit(a) * 16;
}

void int8_pack(const Activations& x, long m, const Linear& a, long m_tile, float* room, const Int8Tiles& out) {
  const long unit = out.unit, depth = units(a) * unit / 32, groups = a.groups(), others = (out.m_tiles - 1) * depth * 512;
  __m512i order[2];
  in_order(a.bits, order);
  for (long i = 0; i < 16; i++) {
    const long row = m_tile * 16 + i;
    float* sums = out.sum + row * groups;
    for (long g = 0; g < groups; g++) sums[g] = 0;
    int8_t* at = out.codes + m_tile * depth * 512 + i * unit;
    const auto next = [=, t = 0l]() mutable {  // tiles of 32 columns: the second of a unit is beside the first
      int8_t* here = at + (unit == 64 && t % 2 ? 32 : 0);
      at += unit == 32 ? 512 : t % 2 ? 1024 : 0;
      if (++t == depth) at += others, t = 0;
      return here;
    };
    if (row < m)
      out.scale[row] = int8_row(x, row, a.k, order, room, next, [=](long t, int32_t sum) {
        if (a.zero) sums[t * 32 / a.group] += (float)sum;
      });
    else
      blank(a.tiles(), next);
  }
}

void int8_as_bf16(const Activations& x, long m, const Linear& a, long m_tile, long m_tiles, float* room, uint8_t* out,
                  float* scale) {
  const __m512i order[2] = {read<__m512i>(NUMBERS), read<__m512i>(NUMBERS + 16)};
  int8_t tile[32];
  for (long i = 0; i < 16; i++) {
    const long row = m_tile * 16 + i;
    const auto widen = [=, &tile](long t, int32_t) {
      const __m512i v = _mm512_cvtepi8_epi16(read<__m256i>(tile));
      const vf low = (vf)_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(v, 16), 16));
      const vf high = (vf)_mm512_cvtepi32_ps(_mm512_srai_epi32(v, 16));
      _mm512_storeu_si512(out + amx_place(t, m_tile, m_tiles, 1) + 64 * i, pairs(low, high));
    };
    if (row < m)
      scale[row] = int8_row(x, row, a.k, order, room, [&] { return tile; }, widen);
    else
      for (long t = 0; t < a.tiles(); t++) memset(out + amx_place(t, m_tile, m_tiles, 1) + 64 * i, 0, 64);
  }
}

void int8_linear(const Linear& a, long from, long to, const Int8Tiles& x, long m, uint8_t* room, const Output& out) {
  of_width(a.bits, [&](auto width) { linear<width.bits>(a, from, to, x, m, room, out); });
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
