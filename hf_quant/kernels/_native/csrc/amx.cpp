// Many rows of x: AMX multiplies tiles of bf16. W is dequantized to bf16, a part of it at a time, into what stays in the
// second-level cache; where x is finer than bf16, both factors are sums of two bf16 numbers.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,amx-tile,amx-bf16")
#endif
#define SET_AVX2
#define SET_AVX512
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "amx.h"

bool amx_allowed() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
#else
  return false;
#endif
}

namespace {

inline vf upper(vf v) { return (vf)_mm512_and_si512(rounded(v), _mm512_set1_epi32((int)0xffff0000)); }

// W of a tile to `parts` tiles of bf16, [16 pairs of k, 16 rows of W, 2].
template <int BITS, int PARTS>
inline void dequantized(const uint8_t* tile, vf scale, vf shift, uint8_t* out) {
  each_pair<BITS>(tile, 0, [&](int r, vf low, vf high) __attribute__((always_inline)) {
    const vf a = low * scale + shift, b = high * scale + shift;
    _mm512_store_si512(out + 64 * r, pairs(a, b));
    if (PARTS == 2) _mm512_store_si512(out + 1024 + 64 * r, pairs(a - upper(a), b - upper(b)));
  });
}

template <int BITS, int PARTS>
void panel(const Linear& a, long b, long blocks, long t0, long count, uint8_t* out) {
  const long groups = a.groups(), steps = a.group / 32;
  static_assert(DEPTH <= Scaling::SOME, "groups of a panel are widened together");
  Scaling scaling(a);
  for (long i = 0; i < blocks; i++) {
    const uint8_t* tile = a.q + ((b + i) * a.tiles() + t0) * 64 * BITS;
    uint8_t* to = out + i * DEPTH * PARTS * 1024;
    const long first = t0 / steps, last = (t0 + count - 1) / steps;
    scaling.widen(a, (b + i) * groups + first, last - first + 1);
    for (long t = 0; t < count; t++, tile += 64 * BITS, to += PARTS * 1024) {
      for (int v = 0; v < BITS; v++) _mm_prefetch((const char*)tile + 64 * v + 2048, _MM_HINT_T0);
      const Group group = scaling.group(a, (b + i) * groups + (t0 + t) / steps, 0);
      dequantized<BITS, PARTS>(tile, group.scale, group.shift(a), to);
    }
  }
}

template <int PARTS>
void panel_of(const Linear& a, long b, long blocks, long t0, long count, uint8_t* out) {
  of_width(a.bits, [&](auto width) { panel<width.bits, PARTS>(a, b, blocks, t0, count, out); });
}

// sums [2][2] (of 16 x 16, at c and c + right, below both by `down`) += x tiles at a (and a + below) times W tiles at b.
template <int TALL, int PARTS>
inline void multiplied(const uint8_t* a, size_t below, const uint8_t* b, size_t beside, long count, float* c, size_t right,
                       size_t down, bool first) {
  sums_in<TALL>(c, right, down, first);
  for (long t = 0; t < count; t++, a += PARTS * 1024, b += PARTS * 1024) {
    for (int p = 0; p < PARTS; p++) {  // low parts of x meet the high ones of W only
      _tile_loadd(4, a + p * 1024, 64);
      if (TALL == 2) {
        _tile_loadd(5, a + below + p * 1024, 64);
      }
      for (int w = 0; w < PARTS - p; w++) {
        _tile_loadd(6, b + w * 1024, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (TALL == 2) {
          _tile_dpbf16ps(2, 5, 6);
        }
        _tile_loadd(7, b + beside + w * 1024, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (TALL == 2) {
          _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
  }
  sums_out<TALL>(c, right, down);
}

template <int PARTS>
void linear(const Linear& a, long from, long to, const uint8_t* x, long m, uint8_t* room, const Output& out) {
  const long m_tiles = (m + 15) / 16, tiles = a.tiles();
  uint8_t* w = room;
  float* c = (float*)(room + WIDE * DEPTH * PARTS * 1024);  // [WIDE][m_tiles] tiles
  configure(m, 64);
  for (long b = from; b < to; b += WIDE) {
    const long blocks = to - b < WIDE ? to - b : WIDE;
    for (long t0 = 0; t0 < tiles; t0 += DEPTH) {
      const long count = tiles - t0 < DEPTH ? tiles - t0 : DEPTH;
      panel_of<PARTS>(a, b, blocks, t0, count, w);
      BARRIER;
      const uint8_t* rows = x + t0 / DEPTH * m_tiles * DEPTH * PARTS * 1024;
      const size_t below = DEPTH * PARTS * 1024, right = m_tiles * 256, down = 256;
      for (long i = 0; i < blocks; i += 2) {  // with an odd number of blocks, the last is multiplied twice
        const size_t beside = i + 1 < blocks ? below : 0, next = i + 1 < blocks ? right : 0;
        for (long j = 0; j < m_tiles; j += 2) {
          float* at = c + (i * m_tiles + j) * 256;
          if (j + 1 < m_tiles)
            multiplied<2, PARTS>(rows + j * below, below, w + i * below, beside, count, at, next, down, t0 == 0);
          else
            multiplied<1, PARTS>(rows + j * below, below, w + i * below, beside, count, at, next, down, t0 == 0);
        }
      }
    }
    BARRIER;
    for (long j = 0; j < m; j++)
      for (long i = 0; i < blocks; i++) {
        const long n = 16 * (b + i), left = a.n - n;
        const vf made = read<vf>(c + ((i * m_tiles + j / 16) * 16 + j % 16) * 16);
        put(out, j * a.n + n, out.by ? made * out.by[j] : made, left < 16 ? left : 16);
      }
  }
  _tile_release();
}

}  // namespace

size_t amx_room(long m_tiles, int parts) { return WIDE * (DEPTH * parts + m_tiles) * 1024; }

void amx_pack(const void* x, int type, long m, long k, int parts, long m_tile, long m_tiles, uint8_t* out) {
  for (long t = 0; t < k / 32; t++) {
    uint8_t* to = out + amx_place(t, m_tile, m_tiles, parts);
    for (long i = 0; i < 16; i++) {
      const long row = m_tile * 16 + i;
      if (row >= m) {
        for (int p = 0; p < parts; p++) memset(to + 1024 * p + 64 * i, 0, 64);
      } else if (type == BF16) {
        memcpy(to + 64 * i, (const uint16_t*)x + row * k + 32 * t, 64);
      } else {
        float values[32];
        uint16_t high[32], low[32];
        load(x, type, row * k + 32 * t, values, 32);
        for (int j = 0; j < 32; j++) {
          high[j] = float_to_bf16(values[j]);
          low[j] = float_to_bf16(values[j] - bf16_to_float(high[j]));
        }
        memcpy(to + 64 * i, high, 64);
        memcpy(to + 1024 + 64 * i, low, 64);
      }
    }
  }
}

void amx_linear(const Linear& a, long from, long to, const uint8_t* x, long m, int parts, uint8_t* room, const Output& out) {
  if (parts == 1) linear<1>(a, from, to, x, m, room, out);
  if (parts == 2) linear<2>(a, from, to, x, m, room, out);
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
