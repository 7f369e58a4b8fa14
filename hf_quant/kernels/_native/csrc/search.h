// Finds scales and zero points of groups of a weight: of the shrunk ranges the one that PyTorch finds in `hf_quant.core.numerics`.
// Included after vector.h by the units of rounding.
//
// Errors are computed faster than PyTorch computes them, and summed in another order, so it is bounded by how much they may differ
// from PyTorch's. Where the bounds leave more than one range, the terms are computed as PyTorch computes them and summed in double;
// where even that leaves more, the group is in doubt, and PyTorch has to decide.
//
// As many groups as a vector has numbers are searched together, one in each lane: nothing is summed across a vector.
#pragma once
#include "rounding.h"
#include "transpose.h"

namespace {

constexpr double UNIT = 5.9604644775390625e-08;  // 2^-24, the rounding of float32
const int BESIDE = L == 16 ? 4 : 2;              // ranges tried at a time: as many as registers hold
const long STRETCH = 32;                         // columns whose errors are summed in float32

// The ranges that are tried, a vector of each for every range.
struct Ranges {
  float *scale, *zero, *inverse, *bottom, *top;  // codes less the zero point, from bottom to top, plus WHOLE
  float *cut, *error;                            // what the weights cost at least that it cuts off; what all cost
  long count;                                    // of those that are asked for
};

// Groups side by side: column by column their weights, and the weights of their errors.
struct Lanes {
  const float *w, *by;  // [size][L]; `by` null for equal weights
  long size;
  vf low, high;  // at most and at least zero
  vf all;        // sum of `by`
  vi sound;      // numbers are finite, and far from where float32 ends
  vf lowest;     // of the errors
  Ranges ranges;

  vf peak() const { return larger(high, -low); }
};

// The group(l)-th group of numbers in lane l, column by column.
template <class Index>
inline const float* side_by_side(const void* from, int type, long size, Index group, float* to) {
  of_type(type, [&](auto kind) {
    for (long i = 0; i < size; i += L) {
      vf lines[L];
      const long count = size - i < L ? size - i : L;
#pragma GCC unroll 16
      for (int l = 0; l < L; l++)
        lines[l] = some_numbers<kind.bits>(from, group(l) * size + i, size - i);
      transpose(lines);
      memcpy(to + i * L, lines, sizeof(vf) * count);
    }
  });
  return to;
}

// Groups first, ..., first + count - 1; the last one again in lanes that are left.
inline Lanes lanes_at(const Search& a, long first, long count, float* room) {
  const auto group = [=](int l) { return first + (l < count ? l : count - 1); };
  float* at = room + 2 * a.size * L;
  const long steps = (a.steps + BESIDE - 1) / BESIDE * BESIDE * L;
  Lanes made = {nullptr, nullptr, a.size, {}, {}, splat((float)a.size), {}, {}, {}};
  made.ranges = {at, at + steps, at + 2 * steps, at + 3 * steps, at + 4 * steps, at + 5 * steps, at + 6 * steps, a.steps};
  made.w = side_by_side(a.w, a.type, a.size, group, room);
  vf odd = {};
  for (long i = 0; i < a.size; i++) {
    const vf v = read<vf>(made.w + i * L);
    made.low = lesser(v, made.low), made.high = larger(v, made.high), odd += v - v;
  }
  const vf peak = made.peak();
  made.sound = (odd == 0) & ((peak == 0) | ((peak >= splat(0x1p-40f)) & (peak <= splat(0x1p60f))));
  if (!a.importance) return made;
  made.by = side_by_side(a.importance, F32, a.size, [&](int l) { return group(l) % a.period; }, room + a.size * L);
  vf negative = made.all = vf{};
  for (long i = 0; i < a.size; i++) {
    const vf v = read<vf>(made.by + i * L);
    made.all += v, negative = lesser(v, negative);
  }
  made.sound &= (negative == 0) & (made.all <= splat(0x1p60f));
  return made;
}

// Sums in double.
struct Sums {
  typedef double half __attribute__((vector_size(4 * L)));
  half first = {}, second = {};

  inline __attribute__((always_inline)) void add(vf v) {
#if defined(SET_AVX512)
    first += (half)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v));
    second += (half)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1));
#elif defined(SET_AVX2)
    first += (half)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v));
    second += (half)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1));
#else
    for (int i = 0; i < L / 2; i++) first[i] += v[i], second[i] += v[L / 2 + i];
#endif
  }
  inline vf floats() const {
    vf made;
    for (int i = 0; i < L / 2; i++) made[i] = (float)first[i], made[L / 2 + i] = (float)second[i];
    return made;
  }
};

// Sums of squared errors of BESIDE ranges, from the first-th on.
template <bool WEIGHED>
inline void errors(const Lanes& g, long first) {
  const Ranges& t = g.ranges;
  vf inverse[BESIDE], scale[BESIDE], bottom[BESIDE], top[BESIDE];
  Sums sums[BESIDE];
  for (int r = 0; r < BESIDE; r++) {
    const long at = (first + r) * L;
    inverse[r] = read<vf>(t.inverse + at), scale[r] = read<vf>(t.scale + at);
    bottom[r] = read<vf>(t.bottom + at), top[r] = read<vf>(t.top + at);
  }
  for (long from = 0; from < g.size; from += STRETCH) {
    const long end = g.size - from < STRETCH ? g.size : from + STRETCH;
    vf sum[BESIDE] = {};
    for (long i = from; i < end; i++) {
      const vf w = read<vf>(g.w + i * L), by = WEIGHED ? read<vf>(g.by + i * L) : vf{};
#pragma GCC unroll 4
      for (int r = 0; r < BESIDE; r++) {
        const vf off = (lesser(larger(w * inverse[r] + splat(WHOLE), bottom[r]), top[r]) - splat(WHOLE)) * scale[r] - w;
        sum[r] += WEIGHED ? off * by * off : off * off;
      }
    }
    if (g.size <= STRETCH) {  // nothing to add it to
      for (int r = 0; r < BESIDE; r++) memcpy(t.error + (first + r) * L, &sum[r], sizeof(vf));
      return;
    }
    for (int r = 0; r < BESIDE; r++) sums[r].add(sum[r]);
  }
  for (int r = 0; r < BESIDE; r++) {
    const vf error = sums[r].floats();
    memcpy(t.error + (first + r) * L, &error, sizeof error);
  }
}

// By how much sums of positive numbers in float32 may differ from the sum: PyTorch's, of 256 and fewer numbers, rounds no
// intermediate one more than 32 times, of more than that hardly more often.
inline double order(const Lanes& g) { return (g.size <= 256 ? 40 : 256) * UNIT; }

// By how much such sums may differ from PyTorch's: codes that lie halfway, products rounded once or twice, the order of the sum.
struct Slack {
  double share, off;  // of the sum, and of its root

  Slack(const Lanes& g, int lane)
      : share(order(g) + 48 * UNIT), off(g.peak()[lane] * 16 * UNIT * __builtin_sqrt((double)g.all[lane])) {}
  // The largest of sums that may be as small as `error` may be.
  double within(double error) const {
    const double most = error * (1 + share) + (2 * __builtin_sqrt(error) + off) * off;
    const double root = (off + __builtin_sqrt(off * off + (1 - share) * (most + off * off))) / (1 - share);
    return root * root;
  }
};

// Not less than that, sooner: with c = 2^-14, 2 a b is at most c a a + b b / c, so that there are no more than 3.2 `share` + 3.5 c
// of the error, and 3.5 / c of the square of `off`.
inline vf about(const Lanes& g, vf error) {
  const float most = (float)(16 * UNIT * 16 * UNIT * 0x1p16);
  return error * (1 + 3e-4f) + larger(g.peak() * g.peak() * most * g.all, splat(0x1p-126f));
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

inline vf zero_point(vf real, float most) { return rounded_whole(lesser(real, splat(most))); }

// Scale and zero point of the full range, and the ranges to be tried.
inline void set_ranges(const Search& a, const Lanes& g, vf& scale, vf& zero) {
  const Ranges& out = g.ranges;
  const float most = (float)((1 << a.bits) - 1);
  const vf range = a.symmetric ? g.peak() * 2 / most : (g.high - g.low) / most, off = g.peak() * (float)(32 * UNIT);
  zero = a.symmetric ? splat((float)(1 << (a.bits - 1))) : zero_point(-g.low / stored(range, F32), most);
  scale = stored(range, a.type_of_scale);
  const vf low = -zero * scale;
  for (long i = 0; i < (out.count + BESIDE - 1) / BESIDE * BESIDE; i++) {
    const vf s = stored(scale * a.shares[i], a.type_of_scale), z = a.symmetric ? zero : zero_point(low * -a.shares[i] / s, most);
    const vf beyond = larger(g.high - (most - z) * s - off, vf{}), below = larger(-z * s - g.low - off, vf{});
    const auto put = [=](float* place, vf v) { memcpy(place + i * L, &v, sizeof v); };
    put(out.scale, s), put(out.zero, z), put(out.inverse, 1 / s);
    put(out.bottom, WHOLE - z), put(out.top, WHOLE + most - z);
    put(out.cut, (beyond * beyond + below * below) * (1 - 0x1p-12f));
  }
}

// The errors of all ranges, and the least; those of ranges that cut off too much in all groups are infinite.
inline void try_all(Lanes& g) {
  const Ranges& t = g.ranges;
  const vf never = splat(__builtin_inff());
  vf most = g.lowest = never;
  for (long i = 0; i < t.count; i += BESIDE) {
    vf cut = read<vf>(t.cut + i * L);
    for (int r = 1; r < BESIDE; r++) cut = lesser(read<vf>(t.cut + (i + r) * L), cut);
    const bool useful = g.by || any(cut <= most);
    if (useful) g.by ? errors<true>(g, i) : errors<false>(g, i);
    for (int r = 0; r < BESIDE; r++) {
      if (!useful) memcpy(t.error + (i + r) * L, &never, sizeof never);
      g.lowest = lesser(read<vf>(t.error + (i + r) * L), g.lowest);
    }
    most = about(g, g.lowest);
  }
}

// The error of a range, of the terms that PyTorch computes.
inline double exact_error(const Lanes& g, long r, int lane) {
  const Ranges& t = g.ranges;
  const long at = r * L + lane;
  const float scale = t.scale[at], bottom = t.bottom[at] - WHOLE, top = t.top[at] - WHOLE;
  double sum = 0;
  for (long i = lane; i < g.size * L; i += L) {
    const float real = g.w[i] / scale, kept = real < bottom ? bottom : real > top ? top : real;
    const float off = rounded(((kept + WHOLE) - WHOLE) * scale) - g.w[i], term = rounded(off * off);
    sum += g.by ? rounded(term * g.by[i]) : term;
  }
  return sum;
}

// Which of several ranges is the best for a group; -1 where PyTorch has to decide.
inline long best_of_several(const Lanes& g, int lane) {
  const Ranges& t = g.ranges;
  const float most = (float)(Slack(g, lane).within(g.lowest[lane]) * (1 + 2 * UNIT));
  const double by = order(g);
  long best = -1, count = 0, last = -1;
  for (long r = 0; r < t.count; r++)
    if (t.error[r * L + lane] <= most) best = r, count++;
  if (count == 1) return best;
  double lowest = __builtin_inf();
  bool clear = false;
  for (long r = 0; r < t.count; r++) {
    const long at = r * L + lane, before = last * L + lane;
    if (t.error[at] > most || (last >= 0 && t.scale[at] == t.scale[before] && t.zero[at] == t.zero[before])) continue;
    const double error = exact_error(g, last = r, lane);
    if (error < lowest) {
      clear = error * (1 + by) < lowest * (1 - by), lowest = error, best = r;
    } else {
      clear = clear && (lowest == 0 || error * (1 - by) > lowest * (1 + by));
    }
  }
  return clear && (lowest == 0 || (lowest > 0x1p-90 && lowest < 0x1p90)) ? best : -1;
}

// The number of the only range whose error is about the least, in the groups that have only one; -1 in the others.
inline vf only_one(const Lanes& g) {
  const vf most = about(g, g.lowest);
  vf count = {}, sum = {};
  for (long r = 0; r < g.ranges.count; r++) {
    const vf near = __builtin_convertvector((vi)(read<vf>(g.ranges.error + r * L) <= most), vf);
    count -= near, sum -= near * (float)r;
  }
  return count == 1 ? sum : splat(-1);
}

[[maybe_unused]] void search(const Search& a, long from, long to, uint8_t* room) {
  for (long first = from; first < to; first += L) {
    const long count = to - first < L ? to - first : L;
    Lanes g = lanes_at(a, first, count, (float*)room);
    vf scale, zero;
    set_ranges(a, g, scale, zero);
    try_all(g);
    const vf only = only_one(g), peak = g.peak();
    for (int l = 0; l < count; l++) {
      const bool done = g.sound[l] && (!a.steps || peak[l] == 0);
      const long best = !g.sound[l] || done ? -1 : only[l] >= 0 ? (long)only[l] : best_of_several(g, l);
      a.doubtful[first + l] = best < 0 && !done;
      a.scale[first + l] = best < 0 ? scale[l] : g.ranges.scale[best * L + l];
      a.zero[first + l] = best < 0 ? zero[l] : g.ranges.zero[best * L + l];
    }
  }
}

}  // namespace
