// Rounds groups of a weight: finds their scales and zero points, and packs their codes. Included after vector.h by the same units.
//
// `search` finds which of the shrunk ranges PyTorch finds in `hf_quant.core.numerics`. It computes errors faster, and in another
// order, so it bounds by how much they may differ from PyTorch's. Where the bounds leave more than one range, the terms are computed
// as PyTorch computes them and summed in double; where even that leaves more, the group is in doubt, and PyTorch has to decide.
#pragma once
#include "vector.h"

namespace {

const float WHOLE = 12582912;  // 1.5 * 2^23: added to a number below 2^22, it rounds it to a whole one, ties to even

inline vf lesser(vf a, vf b) {
#if defined(SET_AVX512)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(SET_AVX2)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// The second one where one of them is NaN.
inline vf larger(vf a, vf b) {
#if defined(SET_AVX512)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(SET_AVX2)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// Keeps a product and a sum apart, which the compiler would round once together.
inline vf rounded(vf v) {
  asm("" : "+m"(v));
  return v;
}

// The numbers of a vector as one, by f(float, float).
template <class F>
inline float folded(vf v, F f) {
  float all[L];
  memcpy(all, &v, sizeof v);
  for (int half = L / 2; half; half /= 2)
    for (int i = 0; i < half; i++) all[i] = f(all[i], all[i + half]);
  return all[0];
}

inline float total(vf v) {
#if defined(SET_AVX512)
  return _mm512_reduce_add_ps((__m512)v);
#else
  return folded(v, [](float a, float b) { return a + b; });
#endif
}

inline float least(vf v) {
#if defined(SET_AVX512)
  return _mm512_reduce_min_ps((__m512)v);
#else
  return folded(v, [](float a, float b) { return a < b ? a : b; });
#endif
}

// To the nearest whole number, ties to even; for numbers below 2^22.
inline vf rounded_whole(vf v) { return (v + splat(WHOLE)) - splat(WHOLE); }

constexpr double UNIT = 5.9604644775390625e-08;  // 2^-24, the rounding of float32
const int BESIDE = L == 16 ? 4 : 2;          // ranges tried at a time: as many as registers hold
const long STRETCH = 32 * L;                 // columns whose errors are summed in float32

// The ranges of a group that are tried, each as scale and zero point; arrays in whole vectors.
struct Ranges {
  float *scale, *zero, *inverse, *bottom, *top;  // codes less the zero point, from bottom to top, plus WHOLE
  float *cut, *error;                            // what the weights cost at least that it cuts off; what all cost
  long count;
};

// A group: its weights in float32, zeros behind them up to whole vectors, and the weights of their errors.
struct Group32 {
  const float *w, *by;
  long size, count;  // columns; those with the zeros
  float low, high;   // at most and at least zero
  double all;        // sum of `by`
  bool sound;        // numbers are finite, and far from where float32 ends
  float lowest;      // of the errors
  Ranges ranges;

  float peak() const { return high > -low ? high : -low; }
};

// Numbers of a type as float32, with zeros up to whole vectors; `from` itself where nothing is to be done.
inline const float* whole(const void* from, int type, long at, long size, long count, float* room) {
  if (type == F32 && size == count) return (const float*)from + at;
  long i = 0;
  of_type(type, [&](auto kind) {
    for (; i + L <= size; i += L) {
      const vf v = numbers<kind.bits>(from, at + i);
      memcpy(room + i, &v, sizeof v);
    }
  });
  if (size < count) {
    load(from, type, at + i, room + i, size - i);
    memset(room + size, 0, sizeof(float) * (count - size));
  }
  return room;
}

inline long in_vectors(long size) { return (size + L - 1) / L * L; }

inline Group32 group_at(const Search& a, long g, float* room) {
  Group32 made = {nullptr, nullptr, a.size, in_vectors(a.size), 0, 0, (double)a.size, false, 0, {}};
  const long steps = in_vectors(a.steps);
  float* at = room + 2 * made.count;
  made.ranges = {at, at + steps, at + 2 * steps, at + 3 * steps, at + 4 * steps, at + 5 * steps, at + 6 * steps, a.steps};
  made.w = whole(a.w, a.type, g * a.size, a.size, made.count, room);
  vf low = {}, high = {}, odd = {};
  for (long i = 0; i < made.count; i += L) {
    const vf v = read<vf>(made.w + i);
    low = lesser(v, low), high = larger(v, high), odd += v - v;
  }
  made.low = least(low), made.high = -least(-high);
  made.sound = total(odd) == 0 && (made.peak() == 0 || (made.peak() >= 0x1p-40f && made.peak() <= 0x1p60f));
  if (!a.importance) return made;
  made.by = whole(a.importance, F32, g % a.period * a.size, a.size, made.count, room + made.count);
  vf sum = {}, negative = {};
  for (long i = 0; i < made.count; i += L) {
    const vf v = read<vf>(made.by + i);
    sum += v, negative = lesser(v, negative);
  }
  made.all = total(sum);
  made.sound = made.sound && total(negative) == 0 && made.all <= 0x1p60;
  return made;
}

// The sums of BESIDE vectors.
inline void totals(const vf* sum, float* out) {
#if defined(SET_AVX512)
  __m256 half[4];
  for (int r = 0; r < 4; r++) half[r] = _mm256_add_ps(_mm512_castps512_ps256((__m512)sum[r]), _mm512_extractf32x8_ps((__m512)sum[r], 1));
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
  for (int r = 0; r < BESIDE; r++) out[r] = total(sum[r]);
#endif
}

// Sums of squared errors of BESIDE ranges, from the first-th on.
template <bool WEIGHED>
inline void errors(const Group32& g, long first) {
  const Ranges& t = g.ranges;
  vf inverse[BESIDE], scale[BESIDE], bottom[BESIDE], top[BESIDE];
  for (int r = 0; r < BESIDE; r++) {
    inverse[r] = splat(t.inverse[first + r]), scale[r] = splat(t.scale[first + r]);
    bottom[r] = splat(t.bottom[first + r]), top[r] = splat(t.top[first + r]);
  }
  float* out = t.error + first;
  double sums[BESIDE] = {};
  for (long from = 0; from < g.count; from += STRETCH) {
    const long end = g.count - from < STRETCH ? g.count : from + STRETCH;
    vf sum[BESIDE] = {};
    for (long i = from; i < end; i += L) {
      const vf w = read<vf>(g.w + i), by = WEIGHED ? read<vf>(g.by + i) : vf{};
#pragma GCC unroll 4
      for (int r = 0; r < BESIDE; r++) {
        const vf off = (lesser(larger(w * inverse[r] + splat(WHOLE), bottom[r]), top[r]) - splat(WHOLE)) * scale[r] - w;
        sum[r] += WEIGHED ? off * by * off : off * off;
      }
    }
    totals(sum, out);
    if (g.count <= STRETCH) return;
    for (int r = 0; r < BESIDE; r++) sums[r] += out[r];
  }
  for (int r = 0; r < BESIDE; r++) out[r] = (float)sums[r];
}

// By how much sums of positive numbers in float32 may differ from the sum: PyTorch's, of 256 and fewer numbers, rounds no
// intermediate one more than 32 times, of more than that hardly more often.
inline double order(const Group32& g) { return (g.size <= 256 ? 40 : 256) * UNIT; }

// By how much such sums may differ from PyTorch's: codes that lie halfway, products rounded once or twice, the order of the sum.
struct Slack {
  double share, off;  // of the sum, and of its root

  explicit Slack(const Group32& g) : share(order(g) + 48 * UNIT), off(g.peak() * 16 * UNIT * __builtin_sqrt(g.all)) {}
  // The largest of sums that may be as small as `error` may be.
  double within(double error) const {
    const double most = error * (1 + share) + (2 * __builtin_sqrt(error) + off) * off;
    const double root = (off + __builtin_sqrt(off * off + (1 - share) * (most + off * off))) / (1 - share);
    return root * root;
  }
  // Not less than that, sooner.
  float about(float error) const { return error * (1 + 0x1p-8f) + (float)(off * off * 2048); }
};

// The same sum, of the terms that PyTorch computes.
inline double exact_error(const Group32& g, long r) {
  const Ranges& t = g.ranges;
  double sum = 0;
  for (long i = 0; i < g.count; i += L) {
    const vf w = read<vf>(g.w + i);
    const vf real = lesser(larger(w / t.scale[r], splat(t.bottom[r] - WHOLE)), splat(t.top[r] - WHOLE));
    const vf off = rounded(rounded_whole(real) * t.scale[r]) - w;
    vf term = rounded(off * off);
    if (g.by) term = rounded(term * read<vf>(g.by + i));
    for (int l = 0; l < L; l++) sum += term[l];
  }
  return sum;
}

// As `floored` stores scales.
inline vf stored(vf scale, int type) {
  const float least = type == F16 ? 0x1p-24f : 0x1p-126f, most = type == F16 ? 65504 : type == BF16 ? 0x1.fep127f : 0x1.fffffep127f;
  scale = lesser(larger(scale, splat(least)), splat(most));
  if (type == F32) return scale;
  if (type == BF16) {
    const vu u = (vu)scale;
    return (vf)((u + 0x7fffu + (u >> 16 & 1)) & 0xffff0000u);
  }
#if defined(SET_AVX512)
  return (vf)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)scale, 0));
#elif defined(SET_AVX2)
  return (vf)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)scale, 0));
#else
  for (int i = 0; i < L; i++) scale[i] = f16_to_float(float_to_f16(scale[i]));
  return scale;
#endif
}

inline vf zero_point(vf real, float most) { return rounded_whole(lesser(larger(real, vf{}), splat(most))); }

// Scale and zero point of the full range, and the ranges to be tried.
inline void set_ranges(const Search& a, const Group32& g, float* scale, float* zero) {
  const Ranges& out = g.ranges;
  const vf never = splat(__builtin_inff());
  const float most = (float)((1 << a.bits) - 1), off = (float)(g.peak() * 32 * UNIT);
  const float range = a.symmetric ? g.peak() * 2 / most : (g.high - g.low) / most;
  *zero = a.symmetric ? (float)(1 << (a.bits - 1)) : zero_point(splat(-g.low) / stored(splat(range), F32), most)[0];
  *scale = stored(splat(range), a.type_of_scale)[0];
  const float low = -*zero * *scale;
  for (long i = 0; i < out.count; i += L) {
    const vf share = read<vf>(a.shares + i), s = stored(*scale * share, a.type_of_scale);
    const vf z = a.symmetric ? splat(*zero) : zero_point(-low * share / s, most), inverse = 1 / s;
    const vf beyond = larger(g.high - (most - z) * s - off, vf{}), below = larger(-z * s - g.low - off, vf{});
    const vf cut = (beyond * beyond + below * below) * (1 - 0x1p-12f), bottom = WHOLE - z, top = WHOLE + most - z;
    memcpy(out.scale + i, &s, sizeof s), memcpy(out.zero + i, &z, sizeof z), memcpy(out.cut + i, &cut, sizeof cut);
    memcpy(out.inverse + i, &inverse, sizeof inverse), memcpy(out.error + i, &never, sizeof never);
    memcpy(out.bottom + i, &bottom, sizeof bottom), memcpy(out.top + i, &top, sizeof top);
  }
}

// The errors of all ranges, and the least; those of ranges that cut off too much stay infinite.
inline void try_all(Group32& g) {
  const Ranges& t = g.ranges;
  const Slack slack(g);
  float most = g.lowest = __builtin_inff();
  for (long i = 0; i < t.count; i += BESIDE) {
    float cut = t.cut[i];
    for (int r = 1; r < BESIDE; r++) cut = t.cut[i + r] < cut ? t.cut[i + r] : cut;
    if (cut > most && !g.by) continue;
    g.by ? errors<true>(g, i) : errors<false>(g, i);
    for (int r = 0; r < BESIDE; r++) g.lowest = t.error[i + r] < g.lowest ? t.error[i + r] : g.lowest;
    most = slack.about(g.lowest);
  }
}

// Which of several ranges is the best, of those with errors up to `most`; -1 where PyTorch has to decide.
inline long best_of_several(const Group32& g, float most) {
  const Ranges& t = g.ranges;
  const double by = order(g);
  long best = -1, last = -1;
  double lowest = __builtin_inf();
  bool clear = false;
  for (long i = 0; i < t.count; i++) {
    if (t.error[i] > most || (last >= 0 && t.scale[i] == t.scale[last] && t.zero[i] == t.zero[last])) continue;
    const double error = exact_error(g, last = i);
    if (error < lowest) {
      clear = error * (1 + by) < lowest * (1 - by), lowest = error, best = i;
    } else {
      clear = clear && (lowest == 0 || error * (1 - by) > lowest * (1 + by));
    }
  }
  return clear && (lowest == 0 || (lowest > 0x1p-90 && lowest < 0x1p90)) ? best : -1;
}

// The best of the ranges; -1 where PyTorch has to decide.
inline long best_of(const Group32& g) {
  const float within = (float)(Slack(g).within(g.lowest) * (1 + 2 * UNIT));
  vf count = {}, sum = {}, index;
  for (int i = 0; i < L; i++) index[i] = (float)i;
  for (long i = 0; i < g.ranges.count; i += L, index += (float)L) {
    const vf near = __builtin_convertvector((vi)(read<vf>(g.ranges.error + i) <= splat(within)), vf);
    count -= near, sum -= near * index;
  }
  const long only = (long)total(sum);
  return total(count) == 1 && only < g.ranges.count ? only : best_of_several(g, within);
}

// Some groups are searched together, one step after another, so that none waits for the results of the step before.
const long TOGETHER = 8, SMALL = 256;

[[maybe_unused]] void search(const Search& a, long from, long to, uint8_t* room) {
  const long together = a.size <= SMALL ? TOGETHER : 1, bytes = (long)rounding_room(a.size, a.steps);
  Group32 some[TOGETHER];
  for (long first = from; first < to; first += together) {
    const long count = to - first < together ? to - first : together;
    for (long i = 0; i < count; i++) {
      some[i] = group_at(a, first + i, (float*)(room + i * bytes));
      if (some[i].sound) set_ranges(a, some[i], &a.scale[first + i], &a.zero[first + i]);
    }
    for (long i = 0; i < count; i++)
      if (some[i].sound) try_all(some[i]);
    for (long i = 0; i < count; i++) {
      const bool done = some[i].sound && (!a.steps || some[i].peak() == 0);
      const long best = some[i].sound && !done ? best_of(some[i]) : -1;
      a.doubtful[first + i] = best < 0 && !done;
      if (best >= 0) a.scale[first + i] = some[i].ranges.scale[best], a.zero[first + i] = some[i].ranges.zero[best];
    }
  }
}

// Eight codes, a byte each, as BITS bytes.
template <int BITS>
inline void pack_eight(const uint8_t* codes, uint8_t* to) {
  uint64_t word;
  memcpy(&word, codes, 8);
  word = (word & 0x00ff00ff00ff00ff) | (word >> 8 & 0x00ff00ff00ff00ff) << BITS;
  word = (word & 0x0000ffff0000ffff) | (word >> 16 & 0x0000ffff0000ffff) << 2 * BITS;
  word = (word & 0x00000000ffffffff) | word >> 32 << 4 * BITS;
  memcpy(to, &word, BITS);
}

// The codes of a group, its columns a multiple of 8.
template <int BITS>
inline void encode_group(const Encoding& a, long g, float* room) {
  typedef uint8_t bytes __attribute__((vector_size(L)));
  const long count = in_vectors(a.size);
  const float* w = whole(a.w, a.type, g * a.size, a.size, count, room);
  const float zero = a.zero[g], most = (float)((1 << BITS) - 1);
  uint8_t *codes = (uint8_t*)(room + count), *to = a.codes + g * a.size * BITS / 8;
  for (long i = 0; i < count; i += L) {
    const vf real = lesser(larger(read<vf>(w + i) / a.scale[g], splat(-zero)), splat(most - zero));
    const vf code = larger(rounded_whole(real) + zero, vf{});  // what is no number becomes zero
    const bytes made = __builtin_convertvector(__builtin_convertvector(code, vi), bytes);
    memcpy(codes + i, &made, sizeof made);
  }
  for (long i = 0; i < a.size; i += 8) pack_eight<BITS>(codes + i, to + i / 8 * BITS);
}

[[maybe_unused]] void encode(const Encoding& a, long from, long to, uint8_t* room) {
  of_width(a.bits, [&](auto width) {
    for (long g = from; g < to; g++) encode_group<width.bits>(a, g, (float*)room);
  });
}

}  // namespace
