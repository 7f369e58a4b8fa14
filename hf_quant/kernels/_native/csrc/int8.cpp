// Many rows of x as int8, without AMX: both codes and x as bytes, whose products are summed up in integers until a group ends.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#endif
#define SET_AVX2
#define SET_AVX512
#include "blocked.h"
#include "bytes.h"

namespace {

// Four columns as bytes. VNNI multiplies bytes with a sign by bytes without: x gets 128 more, which sums start without.
struct Bytes {
  typedef vi Sum;
  static inline Sum start(const Part& part, int i) { return part.start[i]; }
  static inline Sum more(Sum sum, __m512i w, __m512i x) { return (vi)_mm512_dpbusd_epi32((__m512i)sum, x, w); }
  static inline vf number(Sum sum) { return __builtin_convertvector(sum, vf); }

  static inline vi offset(const uint8_t* w, long words) {
    vi sum[4] = {};  // in flight together
    for (long p = 0; p < words; p += 4, w += 4 * 128)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++)
        sum[i] = (vi)_mm512_dpbusd_epi32((__m512i)sum[i], _mm512_set1_epi8(1), _mm512_load_si512(w + 128 * i));
    return (sum[0] + sum[1] + sum[2] + sum[3]) * -128;
  }

  // A chunk of block b, codes less 2^(BITS - 1).
  template <int BITS>
  static void chunk(const Linear& a, long b, long t0, long count, bool, uint8_t* out) {
    const uint8_t* tile = a.q + (b * a.tiles() + t0) * 64 * BITS;
    const __m512i half = _mm512_set1_epi8((char)(1 << (BITS - 1)));
    for (long t = 0; t < count; t++, tile += 64 * BITS, out += 8 * 128)
#pragma GCC unroll 8
      for (int c = 0; c < 8; c++) _mm512_store_si512(out + 128 * c, _mm512_sub_epi8(codes<BITS>(tile, c), half));
  }

  static inline void give(const float* from, const RowTiles& x, const Output& out, long m, long at, long count) {
    for (int i = 0; i < 2 && 16 * i < count; i++) put(out, at + 16 * i, read<vf>(from + 16 * i) * x.scales[m], count - 16 * i);
  }
};

}  // namespace

void bytes_pack(const Activations& x, long first, const Linear& a, long tile, float* room, const RowTiles& out) {
  const long groups = a.groups(), tiles = a.tiles(), steps = a.group / 32;
  int8_t* const rows = (int8_t*)(room + a.k);  // [TALL, k]
  __m512i order[2];
  in_order(a.bits, order);
  const long height = out.height(tile);
  for (long i = 0; i < height; i++) {
    const long m = out.first(tile) + i;
    int8_t* at = rows + i * a.k;
    float* sums = out.sums + m * groups;
    if (a.zero) memset(sums, 0, sizeof(float) * groups);
    out.scales[m] = int8_row(
        x, first + m, a.k, order, room, [&] { return (at += 32) - 32; },
        [&](long t, int32_t sum) {
          if (a.zero) sums[t / steps] += (float)sum;
        });
  }
  for (long t0 = 0; t0 < tiles; t0 += CHUNK) {
    const long count = tiles - t0 < CHUNK ? tiles - t0 : CHUNK;
    side_by_side((uint8_t*)rows + 32 * t0, a.k, height, 8 * count, (int)0x80808080, out.at(t0, count, tile));
  }
}

void bytes_linear(const Linear& a, long from, long to, const RowTiles& x, uint8_t* room, const Output& out) {
  of_width(a.bits, [&](auto width) { linear<Bytes, width.bits>(a, from, to, x, room, out); });
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
