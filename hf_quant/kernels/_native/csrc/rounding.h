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
#pragma GCC unroll 4
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

// To the nearest whole number, ties to even; for numbers below 2^22.
inline vf rounded_whole(vf v) { return (v + splat(WHOLE)) - splat(WHOLE); }

constexpr double UNIT = 5.9604644775390625e-08;  // 2^-24, the rounding of float32
const int BESIDE = L == 16 ? 4 : 2;          // ranges tried at a time: as many as registers hold
const long STRETCH = 32 * L;                 // columns whose errors are summed in float32

// The ranges that are tried, each as scale and zero point.
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
  load(from, type, at + i, room + i, size - i);
  memset(room + size, 0, sizeof(float) * (count - size));
  return room;
}

inline long in_vectors(long size) { return (size + L - 1) / L * L; }

inline Group32 group_at(const Search& a, long g, float* room) {
  Group32 made = {nullptr, nullptr, a.size, in_vectors(a.size), 0, 0, (double)a.size, false};
  made.w = whole(a.w, a.type, g * a.size, a.size, made.count, room);
  vf low = {}, high = {}, odd = {};
  for (long i = 0; i < made.count; i += L) {
    const vf v = read<vf>(made.w + i);
    low = lesser(v, low), high = larger(v, high), odd += v - v;
  }
  made.low = folded(low, [](float a, float b) { return a < b ? a : b; });
  made.high = folded(high, [](float a, float b) { return a > b ? a : b; });
  made.sound = total(odd) == 0 && (made.peak() == 0 || (made.peak() >= 0x1p-40f && made.peak() <= 0x1p60f));
  if (!a.importance) return made;
  made.by = whole(a.importance, F32, g % a.period * a.size, a.size, made.count, room + made.count);
  vf sum = {}, least = {};
  for (long i = 0; i < made.count; i += L) {
    const vf v = read<vf>(made.by + i);
    sum += v, least = lesser(v, least);
  }
  made.all = total(sum);
  made.sound = made.sound && total(least) == 0 && made.all <= 0x1p60;
  return made;
}

// Sums of squared errors of some ranges.
template <bool WEIGHED>
inline void errors(const Group32& g, const Ranges& t, const long* tried) {
  double sums[BESIDE] = {};
  for (long from = 0; from < g.count; from += STRETCH) {
    const long end = g.count - from < STRETCH ? g.count : from + STRETCH;
    vf sum[BESIDE] = {}, inverse[BESIDE], scale[BESIDE], bottom[BESIDE], top[BESIDE];
    for (int r = 0; r < BESIDE; r++) {
      inverse[r] = splat(t.inverse[tried[r]]), scale[r] = splat(t.scale[tried[r]]);
      bottom[r] = splat(t.bottom[tried[r]]), top[r] = splat(t.top[tried[r]]);
    }
    for (long i = from; i < end; i += L) {
      const vf w = read<vf>(g.w + i), by = WEIGHED ? read<vf>(g.by + i) : vf{};
#pragma GCC unroll 4
      for (int r = 0; r < BESIDE; r++) {
        const vf off = (lesser(larger(w * inverse[r] + splat(WHOLE), bottom[r]), top[r]) - splat(WHOLE)) * scale[r] - w;
        sum[r] += WEIGHED ? off * by * off : off * off;
      }
    }
    for (int r = 0; r < BESIDE; r++) sums[r] += total(sum[r]);
  }
  for (int r = 0; r < BESIDE; r++) t.error[tried[r]] = (float)sums[r];
}

// By how much such sums may differ from PyTorch's: codes that lie halfway, products rounded once or twice, the order of the sum.
struct Slack {
  static constexpr double SHARE = 256 * UNIT;
  double off;  // of the root of the sum

  explicit Slack(const Group32& g) : off(g.peak() * 16 * UNIT * __builtin_sqrt(g.all)) {}
  double most(double error) const { return error * (1 + SHARE) + (2 * __builtin_sqrt(error) + off) * off; }
  // The largest of sums that may be as small as `most`.
  double within(double most) const {
    const double root = (off + __builtin_sqrt(off * off + (1 - SHARE) * (most + off * off))) / (1 - SHARE);
    return root * root;
  }
};

// The same sum, of the terms that PyTorch computes.
inline double exact_error(const Group32& g, const Ranges& t, long r) {
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
inline void ranges(const Search& a, const Group32& g, float* scale, float* zero, const Ranges& out) {
  const float most = (float)((1 << a.bits) - 1), off = (float)(g.peak() * 32 * UNIT);
  const float range = a.symmetric ? g.peak() * 2 / most : (g.high - g.low) / most;
  *zero = a.symmetric ? (float)(1 << (a.bits - 1)) : zero_point(splat(-g.low) / stored(splat(range), F32), most)[0];
  *scale = stored(splat(range), a.type_of_scale)[0];
  const float low = -*zero * *scale;
  for (long i = 0; i < out.count; i += L) {
    const vf share = read<vf>(a.shares + i), s = stored(*scale * share, a.type_of_scale);
    const vf z = a.symmetric ? splat(*zero) : zero_point(-low * share / s, most), inverse = 1 / s;
    const vf beyond = larger(g.high - (most - z) * s - off, vf{}), below = larger(-z * s - g.low - off, vf{});
    const vf cut = (beyond * beyond + below * below) * (float)(1 - 2 * Slack::SHARE), bottom = WHOLE - z, top = WHOLE + most - z;
    memcpy(out.scale + i, &s, sizeof s), memcpy(out.zero + i, &z, sizeof z), memcpy(out.cut + i, &cut, sizeof cut);
    memcpy(out.inverse + i, &inverse, sizeof inverse);
    memcpy(out.bottom + i, &bottom, sizeof bottom), memcpy(out.top + i, &top, sizeof top);
  }
}

// Tries all ranges but those that cut off too much; gives how many were tried, and which.
inline long try_all(const Group32& g, const Ranges& t, const Slack& slack, long* tried) {
  double least = __builtin_inf(), most = least;
  long count = 0;
  for (long i = 0; i < t.count;) {
    const long first = count;
    for (; i < t.count && count < first + BESIDE; i++)
      if (g.by || !(t.cut[i] > most)) tried[count++] = i;
    if (count == first) break;
    for (int r = (int)(count - first); r < BESIDE; r++) tried[first + r] = tried[first];
    g.by ? errors<true>(g, t, tried + first) : errors<false>(g, t, tried + first);
    for (long r = first; r < count; r++) least = t.error[tried[r]] < least ? t.error[tried[r]] : least;
    most = slack.most(least);
  }
  const double within = slack.within(most);
  long left = 0;
  for (long i = 0; i < count; i++)
    if (!(t.error[tried[i]] > within)) tried[left++] = tried[i];
  return left;
}

// The best of the ranges, or -1 where PyTorch has to decide.
inline long best_of(const Group32& g, const Ranges& t, long* tried) {
  const long count = try_all(g, t, Slack(g), tried);
  if (count == 1) return tried[0];
  const double order = (g.size <= 256 ? 64 : 256) * UNIT;  // by how much sums of positive numbers differ in other orders
  long best = -1;
  double least = __builtin_inf();
  bool clear = false;
  for (long i = 0; i < count; i++) {
    const long r = tried[i];
    if (i && t.scale[r] == t.scale[tried[i - 1]] && t.zero[r] == t.zero[tried[i - 1]]) continue;
    const double error = exact_error(g, t, r);
    if (error < least) {
      clear = error * (1 + order) < least * (1 - order), least = error, best = r;
    } else {
      clear = clear && (least == 0 || error * (1 - order) > least * (1 + order));
    }
  }
  return clear && (least == 0 || (least > 0x1p-90 && least < 0x1p90)) ? best : -1;
}

[[maybe_unused]] void search(const Search& a, long from, long to, uint8_t* room) {
  float* numbers = (float*)room;
  const long steps = in_vectors(a.steps);
  float* at = numbers + 2 * in_vectors(a.size);
  const Ranges t = {at, at + steps, at + 2 * steps, at + 3 * steps, at + 4 * steps, at + 5 * steps, at + 6 * steps, a.steps};
  long* tried = (long*)(at + 7 * steps);
  for (long i = from; i < to; i++) {
    const Group32 g = group_at(a, i, numbers);
    a.doubtful[i] = !g.sound;
    if (!g.sound) continue;
    ranges(a, g, &a.scale[i], &a.zero[i], t);
    if (!t.count || g.peak() == 0) continue;
    const long best = best_of(g, t, tried);
    a.doubtful[i] = best < 0;
    if (best >= 0) a.scale[i] = t.scale[best], a.zero[i] = t.zero[best];
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
