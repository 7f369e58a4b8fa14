// Compares the kernels of every instruction set with plain loops in double precision, without Python and PyTorch, so that they can be
// run in an emulator of another processor. Ends with 1 and says what differs, or with 0 and how much was compared.
#include <math.h>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif
#include <stdio.h>

#include <random>
#include <vector>

#include "cpu.h"
#include "layout.h"

namespace {

struct Level {
  const char* name;
  const Kernels* kernels;
  bool there;
  void (*rows)(const Linear&, long from, long to, const Digits&, long m, const Output&) = nullptr;  // products of bytes
};

std::vector<Level> levels() {
  std::vector<Level> all = {{"portable", &portable_kernels, true}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  all.push_back({"avx2", &avx2_kernels, avx2});
  all.push_back({"avx512", &avx512_kernels, avx512});
#endif
  return all;
}

// Those that have products of bytes.
std::vector<Level> byte_levels() {
#if defined(__x86_64__)
  const bool vnni = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512dq");
  return {{"vnni", nullptr, vnni, byte_rows}};
#elif defined(__aarch64__)
  const bool dotprod = getauxval(AT_HWCAP) & 1ul << 20, i8mm = getauxval(AT_HWCAP2) & 1ul << 13;
  return {{"dotprod", nullptr, dotprod, byte_rows}, {"i8mm", nullptr, dotprod && i8mm, matrix_rows}};
#else
  return {};
#endif
}

// Those that have products of pairs of rows in bf16.
std::vector<Level> pair_levels() {
#if defined(__aarch64__)
  return {{"bf16", nullptr, (getauxval(AT_HWCAP2) & 1ul << 14) != 0}};
#else
  return {};
#endif
}

std::mt19937 source(0);
float normal() { return std::normal_distribution<float>()(source); }

void put_code(std::vector<uint8_t>& row, int bits, long k, unsigned code) {
  for (int b = 0; b < bits; b++) row[(k * bits + b) / 8] |= (code >> b & 1) << (k * bits + b) % 8;
}

// Puts a code where cpu.h says that its bits lie in the words of a tile.
void put_in_tile(uint32_t* tile, int bits, long row, long column, unsigned code) {
  const int per = 16 / bits, spare = 16 - per * bits;
  for (int b = 0; b < bits; b++) {
    const int pair = (int)column / 2, left = (pair - per * bits) * bits + b;  // among the spare bits
    const int v = left < 0 || !spare ? pair / per : left / spare, at = left < 0 || !spare ? pair % per * bits + b : per * bits + left % spare;
    tile[16 * v + row] ^= (code >> b & 1) << (at + column % 2 * 16);
  }
}

// Types of scales and zero points, the latter -1 where there are none.
struct Kind {
  int scale, zero;
  bool subtracted;
};

const Kind KINDS[] = {{F32, -1, false},  {BF16, -1, false}, {F16, -1, false},   {ONE, -1, false}, {F32, F32, false}, {BF16, BYTE, false},
                      {F16, BYTE, false}, {F32, BYTE, false}, {F16, BF16, false}, {F16, F16, true}, {F32, F32, true}};

// A number in a type; gives it as it is there.
float put(std::vector<uint8_t>& to, int type, float f) {
  uint16_t half = type == BF16 ? float_to_bf16(f) : float_to_f16(f);
  const uint8_t byte = (uint8_t)f;
  const void* from = type == BYTE ? (const void*)&byte : type == BF16 || type == F16 ? (const void*)&half : &f;
  to.insert(to.end(), (const uint8_t*)from, (const uint8_t*)from + (type == BYTE ? 1 : type == BF16 || type == F16 ? 2 : 4));
  return type == BF16 ? bf16_to_float(half) : type == F16 ? f16_to_float(half) : f;
}

// A random weight in both layouts, and what it stands for.
struct Weight {
  long n, k, group;
  int bits;
  std::vector<uint8_t> portable, tiles;
  std::vector<double> dense;               // [n, k]
  std::vector<uint8_t> scale, zero;        // [blocks, groups, 16] of their types
  Linear linear;

  Weight(long n, long k, long group, int bits, const Kind& kind) : n(n), k(k), group(group), bits(bits) {
    const long blocks = (n + 15) / 16, groups = k / group, bytes = k * bits / 8;
    std::vector<unsigned> codes(n * k);
    for (unsigned& code : codes) code = source() & ((1u << bits) - 1);
    for (long i = 0; i < n; i++) {
      std::vector<uint8_t> row(bytes);
      for (long j = 0; j < k; j++) put_code(row, bits, j, codes[i * k + j]);
      portable.insert(portable.end(), row.begin(), row.end());
    }
    tiles.resize(blocks * (k / 32) * 64 * bits);
    for (long i = 0; i < n; i++)
      for (long j = 0; j < k; j++) {
        uint32_t* tile = (uint32_t*)&tiles[(i / 16 * (k / 32) + j / 32) * 64 * bits];
        put_in_tile(tile, bits, i % 16, j % 32, codes[i * k + j] ^ (bits == 8 ? 0x80 : 0));
      }
    const int middle = 1 << (bits - 1);
    std::vector<float> scales, zeros;
    for (long i = 0; i < blocks * groups * 16; i++) {
      const float s = kind.scale == ONE && i ? scales[0] : 0.01f + 0.02f * fabsf(normal());
      scales.push_back(put(scale, kind.scale, i == 5 && kind.scale == F16 ? 3e-6f : s));  // subnormal there
      const float z = kind.zero == BYTE ? (float)(source() % (2 * middle)) : middle + normal();
      if (kind.zero >= 0) zeros.push_back(put(zero, kind.zero, kind.subtracted ? z * s : z));
    }
    for (long i = 0; i < n; i++)
      for (long j = 0; j < k; j++) {
        const long at = (i / 16 * groups + j / group) * 16 + i % 16;
        const double from = kind.zero < 0 ? middle : kind.subtracted ? zeros[at] / (double)scales[at] : zeros[at];
        dense.push_back((codes[i * k + j] - from) * scales[at]);
      }
    linear = {tiles.data(), scale.data(), zero.empty() ? nullptr : zero.data(), bits, kind.scale, n, k, group};
    linear.zero_type = kind.zero, linear.subtracted = kind.subtracted;
  }
};

float number(const std::vector<uint8_t>& y, int type, long at) {
  float f;
  load(y.data(), type, at, &f, 1);
  return f;
}

// How far a number may be from the sum that it stands for.
double allowed(int type, double value, double size) {  // size: of the terms of the sum
  return 2e-6 * size + (type == BF16 ? 1.0 / 256 : type == F16 ? 1.0 / 2048 : 0) * fabs(value) + 1e-7;
}

long wrong = 0, compared = 0;

void check(const Level& level, const char* what, const Weight& w, int type, double got, double wanted, double size) {
  compared++;
  if (fabs(got - wanted) <= allowed(type, wanted, size)) return;
  if (wrong++ < 20)
    printf("%s, %s, %d bits, %ld x %ld in groups of %ld, type %d: %.9g instead of %.9g\n", level.name, what, w.bits, w.n, w.k,
           w.group, type, got, wanted);
}

// Rows of x and their products in double precision.
struct Products {
  std::vector<float> x;
  std::vector<double> sum, size;  // the latter of the terms of a sum
  Products(const Weight& w, long m) : x(m * w.k) {
    for (float& f : x) f = round16(normal());
    for (long i = 0; i < m; i++)
      for (long j = 0; j < w.n; j++) {
        double total = 0, large = 0;
        for (long c = 0; c < w.k; c++) {
          total += x[i * w.k + c] * w.dense[j * w.k + c];
          large += fabs(x[i * w.k + c]) * (1 << w.bits) * 0.1;
        }
        sum.push_back(total), size.push_back(large);
      }
  }
  static float round16(float f) { return bf16_to_float(float_to_bf16(f)); }  // which every type holds
  void check(const Level& level, const char* what, const Weight& w, int type, const std::vector<uint8_t>& y) const {
    for (size_t i = 0; i < sum.size(); i++) ::check(level, what, w, type, number(y, type, i), sum[i], size[i]);
  }
};

void compare(const Level& level, const Weight& w, int type, long m) {
  const size_t size = type == F32 ? 4 : 2;
  const Products products(w, m);
  std::vector<float> sums(m * w.linear.groups());
  for (long i = 0; i < m * w.k; i++) sums[i / w.group] += products.x[i];
  std::vector<uint8_t> y(m * w.n * size, 0xff);  // NaN where nothing is written
  level.kernels->rows(w.linear, 0, w.linear.blocks(), products.x.data(), sums.data(), m, {y.data(), type});
  products.check(level, "product", w, type, y);
  std::vector<uint8_t> dense(w.n * w.k * size, 0xff);
  level.kernels->dequantize(w.linear, 0, w.linear.blocks(), {dense.data(), type});
  for (long i = 0; i < w.n * w.k; i++)
    check(level, "weight", w, type, number(dense, type, i), w.dense[i], (1 << w.bits) * 0.1);
}

// Many rows, in panels that start at any block.
void compare_many(const Level& level, const Weight& w, int type, long m) {
  const Products products(w, m);
  std::vector<uint8_t> x, y(m * w.n * (type == F32 ? 4 : 2), 0xff);
  for (float f : products.x) put(x, type, f);
  std::vector<float> spread(rows_room(m, w.k) / sizeof(float), NAN), room(panel_room(m) / sizeof(float), NAN);
  const FloatRows rows = {spread.data(), m};
  for (long i = 0; i < m; i++) level.kernels->spread(x.data(), type, w.k, i, rows);
  const long blocks = w.linear.blocks(), parts[] = {0, blocks / 2, blocks};
  for (int i = 0; i < 2; i++)
    level.kernels->panels(w.linear, parts[i], parts[i + 1], rows, room.data(), {y.data(), type});
  products.check(level, "many rows", w, type, y);
}

// Products of bytes of m rows: of x in 16 bits, as two digits, and rounded to INT8 by row or by one scale.
void compare_bytes(const Level& level, const Weight& w, int type, long m, bool fixed) {
  const long k = w.k, count = m * w.linear.tiles();
  std::vector<uint16_t> x(m * k);
  for (uint16_t& h : x) h = type == BF16 ? float_to_bf16(normal()) : float_to_f16(normal());
  std::vector<float> scale(count), sum(count), room(k), wide(m * k);
  load(x.data(), type, 0, wide.data(), m * k);
  std::vector<int32_t> less(count);
  const int32_t left[] = {3};
  const float step = 0.02f;
  for (int each : {1, 2}) {
    std::vector<int8_t> digits(count * 32 * each);
    const Digits made = {digits.data(), scale.data(), less.data(), sum.data(), each};
    const Activations a = {x.data(), type, left, 1, fixed ? &step : nullptr};
    for (long i = 0; i < m; i++) {
      if (each == 1) byte_int8(a, i, w.linear, room.data(), made);
      if (each == 2 && !byte_digits(x.data(), type, i, w.linear, made)) wrong++, printf("%s: digits refused\n", level.name);
    }
    std::vector<uint16_t> y(m * w.n, 0xffff);
    level.rows(w.linear, 0, w.linear.blocks(), made, m, {y.data(), type});
    for (long i = 0; i < m; i++) {
      double most = 0;
      for (long c = 0; c < k; c++)
        if (c != left[0] && fabs(wide[i * k + c]) > most) most = fabs(wide[i * k + c]);
      const float by = 1 / (fixed ? step : (float)most / 127), unit = fixed ? step : (float)most / 127;
      for (long j = 0; j < w.n; j++) {
        double total = 0, large = 0;
        for (long c = 0; c < k; c++) {
          double v = wide[i * k + c];
          if (each == 1) v = c == left[0] ? 0 : unit * fmin(fmax(nearbyint(wide[i * k + c] * by), -127), 127);
          total += v * w.dense[j * k + c], large += fabs(v * w.dense[j * k + c]) + fabs(v) * (1 << w.bits) * 0.01;
        }
        float got;
        load(y.data(), type, i * w.n + j, &got, 1);
        check(level, each == 1 ? "INT8" : "digits", w, type, got, total, large * (each == 2 ? 10 : 1));
      }
    }
  }
}

#if defined(__aarch64__)
// Many rows in bf16, in panels that start at any block, beside weights that are rounded to bf16 or not.
void compare_pairs(const Level& level, const Weight& w, long m) {
  const Products products(w, m);
  std::vector<uint16_t> x, y(m * w.n, 0xffff), spread(pairs_room(m, w.k) / 2, 0xffff);  // NaN where nothing is written
  for (float f : products.x) x.push_back(float_to_bf16(f));
  std::vector<uint8_t> room(panel_room(m), 0xff);
  const RowPairs rows = {spread.data(), m};
  for (long i = 0; i < m; i++) pairs_spread(x.data(), w.k, i, rows);
  const long blocks = w.linear.blocks(), parts[] = {0, blocks / 2, blocks};
  for (int i = 0; i < 2; i++) pairs_panels(w.linear, parts[i], parts[i + 1], rows, room.data(), {y.data(), BF16});
  for (long i = 0; i < m; i++)
    for (long j = 0; j < w.n; j++) {
      double rounded = 0, large = 0;
      for (long c = 0; c < w.k; c++) {
        const double weight = w.dense[j * w.k + c];
        rounded += products.x[i * w.k + c] * bf16_to_float(float_to_bf16((float)weight));
        large += fabs(products.x[i * w.k + c] * weight);
      }
      const double got = bf16_to_float(y[i * w.n + j]);
      check(level, "pairs of rows", w, BF16, got, rounded, large * 20 + (1 << w.bits) * 0.1);  // some weights lie between two of bf16
      check(level, "pairs of rows", w, BF16, got, products.sum[i * w.n + j], large / 512 / 2e-6);
    }
}
#endif

void layouts(const Level& level, const Weight& w) {
  std::vector<uint8_t> there(w.tiles.size(), 0xff), back(w.portable.size(), 0xff);
  const long bytes = w.k * w.bits / 8, tiles = w.k / 32 * 64 * w.bits;
  for (long b = 0; b < w.linear.blocks(); b++) {
    const long rows = w.n - 16 * b < 16 ? w.n - 16 * b : 16;
    level.kernels->pack(&w.portable[16 * b * bytes], &there[b * tiles], w.bits, rows, w.k);
    unpack_block(&w.tiles[b * tiles], &back[16 * b * bytes], w.bits, rows, w.k);
  }
  compared += 2;
  if (there != w.tiles) wrong++, printf("%s, tiles of %d bits, %ld x %ld\n", level.name, w.bits, w.n, w.k);
  if (back != w.portable) wrong++, printf("layout of %d bits, %ld x %ld: not what it was\n", w.bits, w.n, w.k);
}

void turned(const Level& level, long rows, long columns) {
  const long wide = columns + 3, tall = rows + 5;
  std::vector<uint32_t> words(rows * wide), there(columns * tall), wanted(there.size());
  for (uint32_t& word : words) word = (uint32_t)source();
  for (long r = 0; r < rows; r++)
    for (long c = 0; c < columns; c++) wanted[c * tall + r] = words[r * wide + c];
  const Words all = {words.data(), rows, columns, wide, there.data(), tall};
  level.kernels->turn(all, 0, columns / 3);
  level.kernels->turn(all, columns / 3, columns);
  compared++;
  if (there != wanted) wrong++, printf("%s, transpose of %ld x %ld\n", level.name, rows, columns);
}

void turned_codes(const Level& level, long rows, long columns) {
  const uint32_t order = 0x75316420;
  std::vector<uint32_t> words(rows * columns), there(columns * rows), wanted(there.size());
  for (uint32_t& word : words) word = (uint32_t)source();
  for (long r = 0; r < rows; r++)
    for (long c = 0; c < 8 * columns; c++) {
      const uint32_t code = words[r * columns + c / 8] >> c % 8 * 4 & 15;
      wanted[((c / 8 * 8 + (order >> c % 8 * 4 & 15)) * rows + r) / 8] |= code << r % 8 * 4;
    }
  const Words all = {words.data(), rows, columns, columns, there.data(), rows / 8};
  level.kernels->turn_codes(all, order, 0, columns / 3);
  level.kernels->turn_codes(all, order, columns / 3, columns);
  compared++;
  if (there != wanted) wrong++, printf("%s, transpose of codes in %ld x %ld words\n", level.name, rows, columns);
}

// The squared error of a group on a grid, and its codes.
double error_of(const std::vector<float>& w, const std::vector<float>& by, long from, long size, int bits, float scale, float zero,
                std::vector<uint8_t>* codes) {
  double sum = 0;
  const float most = (1 << bits) - 1;
  for (long i = from; i < from + size; i++) {
    const float code = fminf(fmaxf(nearbyintf(w[i] / scale) + zero, 0), most);
    const double off = (double)(code - zero) * scale - w[i];
    sum += off * off * by[i - from];
    if (codes) put_code(*codes, bits, i, (unsigned)code);
  }
  return sum;
}

// Scales that are searched beside those with the least error of all, and packed codes.
void roundings(const Level& level, int type, int bits, bool symmetric, bool weighed, long size) {
  const long groups = 21, steps = 20;
  std::vector<uint8_t> stored, doubtful(groups, 9), codes(groups * size * bits / 8, 0xff), wanted(codes.size());
  std::vector<float> w, by(size, 1), shares, scale(groups), zero(groups);
  for (long i = 0; i < groups * size; i++) w.push_back(put(stored, type, i / size == 3 ? 0 : normal() * (i % 19 ? 0.02f : 0.2f)));
  for (long i = 0; weighed && i < size; i++) by[i] = i % 5 ? fabsf(normal()) : 0;
  for (long i = 0; i < 32; i++) shares.push_back(i < steps ? 1 - 0.4f * i / (steps - 1) : 1);
  std::vector<uint8_t> room(rounding_room(size, steps));
  const Search search = {stored.data(), type, size, weighed ? by.data() : nullptr, 1, shares.data(), steps, bits, F32, symmetric,
                         scale.data(), zero.data(), doubtful.data()};
  level.kernels->search(search, 0, groups, room.data());
  const float most = (1 << bits) - 1;
  for (long g = 0; g < groups; g++) {
    float low = 0, high = 0;
    for (long i = g * size; i < (g + 1) * size; i++) low = fminf(low, w[i]), high = fmaxf(high, w[i]);
    const float range = fmaxf(symmetric ? fmaxf(high, -low) * 2 / most : (high - low) / most, 1.17549435e-38f);
    const float middle = symmetric ? 1 << (bits - 1) : fminf(fmaxf(nearbyintf(-low / range), 0), most);
    double least = INFINITY;
    for (long i = 0; i < steps; i++) {
      const float s = fmaxf(range * shares[i], 1.17549435e-38f);
      const float z = symmetric ? middle : fminf(fmaxf(nearbyintf(middle * range * shares[i] / s), 0), most);
      least = fmin(least, error_of(w, by, g * size, size, bits, s, z, nullptr));
    }
    compared++;
    if (doubtful[g]) scale[g] = range, zero[g] = middle;  // PyTorch's part
    const double error = error_of(w, by, g * size, size, bits, scale[g], zero[g], &wanted);
    if (doubtful[g] ? g == 3 : error > least * (1 + 1e-5))
      wrong++, printf("%s, search in %d bits, group of %ld, type %d: error %g, least %g\n", level.name, bits, size, type, error, least);
  }
  level.kernels->encode({stored.data(), type, size, scale.data(), zero.data(), bits, codes.data()}, 0, groups, room.data());
  compared++;
  if (codes != wanted) wrong++, printf("%s, codes of %d bits, groups of %ld, type %d\n", level.name, bits, size, type);
}

void halves() {  // every number of 16 bits stays what it is
  for (unsigned h = 0; h < 1u << 16; h++) {
    compared += 2;
    const bool nan16 = (h & 0x7c00) == 0x7c00 && (h & 0x3ff), nanb = (h & 0x7f80) == 0x7f80 && (h & 0x7f);
    if (!nan16 && float_to_f16(f16_to_float((uint16_t)h)) != h) wrong++, printf("float16 %04x\n", h);
    if (!nanb && float_to_bf16(bf16_to_float((uint16_t)h)) != h) wrong++, printf("bfloat16 %04x\n", h);
  }
}

// f of those that this processor has.
template <class F>
void compare_each(const std::vector<Level>& all, F f) {
  for (const Level& level : all) {
    if (!level.there) {
      printf("%s: this processor has it not\n", level.name);
      continue;
    }
    const long before = compared;
    f(level);
    printf("%s: %ld numbers\n", level.name, compared - before);
  }
}

}  // namespace

// With an argument, only the smaller shapes.
int main(int given, char**) {
  halves();
  std::vector<std::vector<long>> shapes = {{1, 32}, {17, 64}, {16, 320}, {40, 96}};
  if (given > 1) shapes.resize(2);
  compare_each(levels(), [&](const Level& level) {
    for (const auto& shape : shapes)
      for (int bits : {2, 3, 4, 5, 6, 7, 8})
        for (long group : {32L, 64L, shape[1]})
          for (const Kind& kind : KINDS) {
            if (shape[1] % group) continue;
            const Weight w(shape[0], shape[1], group, bits, kind);
            layouts(level, w);
            for (int out : {F32, BF16, F16})
              for (long m : {1, 2, 3, 7}) compare(level, w, out, m);
            for (long m : {4, 5, 15, 31}) compare_many(level, w, (int)(m % 3), m);
          }
    for (long rows : {1, 15, 64, 131})
      for (long columns : {1, 16, 50, 216}) turned(level, rows, columns), turned_codes(level, 8 * rows, columns);
    const long groups[] = {32, 96, 4128};  // x that is larger than NEAR, and many blocks
    for (int out : {F32, BF16, F16}) compare_many(level, Weight(330, 4128, groups[out], 4, KINDS[4]), out, 37);
    for (int type : {F32, BF16, F16})
      for (int bits : {2, 3, 4, 5, 8})
        for (long size : {16L, 32L, 128L, 136L, 576L})
          for (int kind = 0; kind < 4; kind++) roundings(level, type, bits, kind & 1, kind & 2, size);
  });
  compare_each(byte_levels(), [&](const Level& level) {
    for (const auto& shape : shapes)
      for (int bits : {2, 3, 4, 5, 6, 7, 8})
        for (long group : {32L, 64L, shape[1]})
          for (const Kind& kind : KINDS)
            for (int type : {BF16, F16})
              for (long m : {1, 2, 3, 4, 5, 9}) {
                if (shape[1] % group) continue;
                const Weight w(shape[0], shape[1], group, bits, kind);
                compare_bytes(level, w, type, m, m % 2);
              }
  });
#if defined(__aarch64__)
  compare_each(pair_levels(), [&](const Level& level) {
    for (const auto& shape : shapes)
      for (int bits : {2, 3, 4, 5, 6, 7, 8})
        for (long group : {32L, 64L, shape[1]})
          for (const Kind& kind : KINDS)
            for (long m : {1, 2, 5, 6, 9}) {
              if (shape[1] % group) continue;
              compare_pairs(level, Weight(shape[0], shape[1], group, bits, kind), m);
            }
    compare_pairs(level, Weight(330, 4128, 96, 4, KINDS[4]), 37);
  });
#endif
  printf("%ld numbers compared, %ld differ\n", compared, wrong);
  return wrong != 0;
}
