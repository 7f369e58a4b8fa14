// Many rows of x times two blocks of W at a time, without AMX: some columns of the blocks become what can be multiplied, in what
// stays in the first-level cache, and are multiplied by all rows. Included by the units that have such products, each for its own
// `Kind`: how words of W and x are multiplied and how sums become float32. A word of x, and of a row of W, holds some columns.
#pragma once
#include "transpose.h"

namespace {

const long AHEAD = 32;  // words of x that are fetched before they are needed

// Rows of words, `far` bytes apart, as a tile: the words of a column side by side, in all of them the bits of `flip` turned over.
inline void side_by_side(const uint8_t* from, long far, long rows, long words, int flip, uint32_t* to) {
  for (long p = 0; p < words; p += 16) {
    const __mmask16 left = words - p < 16 ? (__mmask16)((1u << (words - p)) - 1) : (__mmask16)~0;
    vf row[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
      const uint8_t* const at = from + (i < rows ? i : 0) * far + 4 * p;
      _mm_prefetch((const char*)at + 512, _MM_HINT_T0);
      row[i] = (vf)((vi)_mm512_maskz_loadu_epi32(left, at) ^ flip);
    }
    transpose(row);
#pragma GCC unroll 16
    for (int j = 0; j < 16; j++, to += rows) {  // what is written beyond a column, the next ones write over
      const long rest = (words - p - j) * rows;
      if (rest >= 16) _mm512_storeu_si512(to, (__m512i)row[j]);
      if (rest > 0 && rest < 16) _mm512_mask_storeu_epi32(to, (__mmask16)((1u << rest) - 1), (__m512i)row[j]);
    }
  }
}

// Columns of a chunk that are multiplied before what they add is scaled.
struct Part {
  long words, group;
  vf scale[2], shift[2];
  bool shifted;
  vi start[2];  // what sums of integers start from
};

// Codes of two blocks that are fetched while others are multiplied, some bytes on with every word.
struct Ahead {
  const char* at[2];
  long step;
};

// c [T, 2, 16], nothing as long as it is `fresh`, += rows of x times the columns of two blocks.
template <class Kind, int T>
void multiplied(const uint8_t* w, const uint32_t* x, const Part* part, long parts, const float* sums, long groups, float* c,
                bool fresh, Ahead ahead) {
  for (; parts; parts--, part++) {
    typename Kind::Sum sum[T][2];
#pragma GCC unroll 8
    for (int m = 0; m < T; m++) sum[m][0] = Kind::start(*part, 0), sum[m][1] = Kind::start(*part, 1);
    for (long p = 0; p < part->words; p++, w += 128, x += T) {
      _mm_prefetch((const char*)(x + AHEAD * T), _MM_HINT_T0);
      for (int i = 0; i < 2; i++) _mm_prefetch(ahead.at[i], _MM_HINT_T0), ahead.at[i] += ahead.step;
      const __m512i one = _mm512_load_si512(w), other = _mm512_load_si512(w + 64);
#pragma GCC unroll 8
      for (int m = 0; m < T; m++) {
        const __m512i both = _mm512_set1_epi32((int)x[m]);
        sum[m][0] = Kind::more(sum[m][0], one, both);
        sum[m][1] = Kind::more(sum[m][1], other, both);
      }
    }
    if (fresh)
#pragma GCC unroll 8
      for (int m = 0; m < T; m++)
        for (int i = 0; i < 2; i++)
          _mm512_store_ps(c + 32 * m + 16 * i, (__m512)(Kind::number(sum[m][i]) * part->scale[i]));
    else
#pragma GCC unroll 8
      for (int m = 0; m < T; m++) {
        const vf one = read<vf>(c + 32 * m) + Kind::number(sum[m][0]) * part->scale[0];
        const vf other = read<vf>(c + 32 * m + 16) + Kind::number(sum[m][1]) * part->scale[1];
        _mm512_store_ps(c + 32 * m, (__m512)one), _mm512_store_ps(c + 32 * m + 16, (__m512)other);
      }
    fresh = false;
    if (!part->shifted) continue;
    for (int m = 0; m < T; m++)
      for (int i = 0; i < 2; i++) {
        const vf all = read<vf>(c + 32 * m + 16 * i) + part->shift[i] * sums[m * groups + part->group];
        _mm512_store_ps(c + 32 * m + 16 * i, (__m512)all);
      }
  }
}

typedef void (*Multiply)(const uint8_t*, const uint32_t*, const Part*, long, const float*, long, float*, bool, Ahead);

template <class K>
Multiply multiply_of(long tall) {
  static const Multiply all[] = {multiplied<K, 1>, multiplied<K, 2>, multiplied<K, 3>, multiplied<K, 4>,
                                 multiplied<K, 5>, multiplied<K, 6>, multiplied<K, 7>, multiplied<K, 8>};
  return all[tall - 1];
}

// How a chunk of two blocks is scaled, in parts that end with groups; the number of parts.
template <class Kind>
long parted(const Linear& a, long b, long other, long t0, long count, const RowTiles& x, const uint8_t* w, Part* part) {
  if (x.scaled) {
    part[0] = {x.words * count, 0, {splat(1), splat(1)}, {}, false, {}};
    return 1;
  }
  const long groups = a.groups(), steps = a.group / 32;
  Scaling scaling[2] = {Scaling(a), Scaling(a)};
  for (int i = 0; i < 2; i++)
    scaling[i].widen(a, (i ? other : b) * groups + t0 / steps, (t0 + count - 1) / steps - t0 / steps + 1);
  long parts = 0;
  for (long t = t0; t < t0 + count; parts++, part++) {
    const long g = t / steps, to = (g + 1) * steps < t0 + count ? (g + 1) * steps : t0 + count;
    part->words = x.words * (to - t), part->group = g, part->shifted = a.zero && t == g * steps;
    for (int i = 0; i < 2; i++) {
      const Group group = scaling[i].group(a, (i ? other : b) * groups + g, 0);
      part->scale[i] = group.scale, part->shift[i] = group.shift(a);
      part->start[i] = Kind::offset(w + 64 * i, part->words);
    }
    w += 128 * part->words, t = to;
  }
  return parts;
}

// Blocks from, ..., end - 1. Kind::chunk expands a chunk of a block, Kind::give writes up to 32 numbers of a row of the output.
template <class Kind, int BITS>
void linear(const Linear& a, long from, long end, const RowTiles& x, uint8_t* room, const Output& out) {
  const long groups = a.groups();
  uint8_t* w = room;
  float* c = (float*)(room + CHUNK * x.words * 128);  // [BLOCKS / 2][m][2][16]
  Part part[CHUNK];
  for (long b = from; b < end; b += BLOCKS) {
    const long blocks = end - b < BLOCKS ? end - b : BLOCKS, twos = (blocks + 1) / 2;
    for (long t0 = 0; t0 < a.tiles(); t0 += CHUNK) {
      const long count = a.tiles() - t0 < CHUNK ? a.tiles() - t0 : CHUNK;
      for (long i = 0; i < twos; i++) {  // with an odd number of blocks, the last is multiplied twice
        const long one = b + 2 * i, other = one + 1 < end ? one + 1 : one;
        Kind::template chunk<BITS>(a, one, t0, count, x.scaled, w);
        Kind::template chunk<BITS>(a, other, t0, count, x.scaled, w + 64);
        const long parts = parted<Kind>(a, one, other, t0, count, x, w, part);
        const bool last = i + 1 == twos;  // then the first two blocks are next, a chunk on
        const long bytes = 64 * BITS, next = (last ? b : one + 2) * a.tiles() + (last ? t0 + CHUNK : t0);
        const char* codes = (const char*)a.q + next * bytes;
        const long far = a.tiles() * bytes, each = (count * bytes + x.tiles - 1) / x.tiles;
        const long step = (each + x.words * count - 1) / (x.words * count);
        const long n = 16 * one, left = (16 * end < a.n ? 16 * end : a.n) - n;
        const bool complete = t0 + count == a.tiles();
        for (long j = 0; j < x.tiles; j++) {
          const long m = x.first(j), height = x.height(j);
          float* const sums = c + 32 * (i * x.m + m);
          multiply_of<Kind>(height)(w, x.at(t0, count, j), part, parts, x.sums + m * groups, groups, sums, t0 == 0,
                                    {{codes + j * each, codes + j * each + far}, step});
          for (long r = 0; complete && r < height; r++)
            Kind::give(sums + 32 * r, x, out, m + r, (m + r) * a.n + n, left < 32 ? left : 32);
        }
      }
    }
  }
}

}  // namespace
