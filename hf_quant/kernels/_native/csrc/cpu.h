// Products with packed codes on CPUs: what the translation units share. No dependency on PyTorch.
//
// Layout of a weight [N, K] of b-bit codes: tiles of 16 rows (n) by 32 columns (k), those of 16 rows one after another
// along k. A tile is b vectors of 16 words of 32 bits, one word for each row. In both halves of a word, 16 / b codes lie
// side by side from the low bits on; position i of vector v holds columns 2 (v 16 / b + i) (low half) and the next
// one (high half): a pair of neighbours is what AMX wants in a word. With 3, 5, 6 and 7 bits, the high bits of the halves that
// are left over hold the last pairs, vector after vector: with three bits, bit 15 of the three are the bits of the sixteenth.
// Codes of eight bits are stored less 128, as int8.
// Rows are padded with zero codes, K is a multiple of 32. Scales and zero points, [N / 16, G, 16], have the types in which they
// came, and become float32 in registers; a scale may also be one number for the whole weight. In two levels they are bytes: a scale
// is a byte times a unit, and a byte times a unit is subtracted, units [N / 16, G >> shift, 16]; never with INT8 inputs.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum Type { F32 = 0, BF16 = 1, F16 = 2, BYTE = 3, ONE = 4 };

struct Linear {
  const uint8_t* q;
  const void* scale;  // of any type; ONE: a float32
  const void* zero;   // of any but ONE, or null where all are 2^(bits - 1)
  int bits, scale_type;
  long n, k, group;
  const float *unit = nullptr, *zero_unit = nullptr;  // in two levels
  int shift = 0;                                      // 2^shift groups share a unit
  int zero_type = F32;
  bool subtracted = false;  // whether `zero` is subtracted from scaled codes, not from codes
  long blocks() const { return (n + 15) / 16; }
  long tiles() const { return k / 32; }
  long groups() const { return k / group; }
};

struct Output {
  void* y;  // [M, N]
  int type;
  const float* by = nullptr;  // on AMX, what each row is multiplied by at last; null for nothing
};

static inline float bf16_to_float(uint16_t h) {
  uint32_t u = (uint32_t)h << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

static inline uint16_t float_to_bf16(float f) {  // to nearest, ties to even
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

static inline float f16_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff, u;
  float f;
  if (rest >= 0x7c00) {
    u = sign | 0x7f800000 | (rest & 0x3ff) << 13;
  } else {  // 2^112 moves the exponent, and makes subnormal numbers normal
    u = rest << 13;
    memcpy(&f, &u, 4);
    f *= 5.192296858534828e33f;
    memcpy(&u, &f, 4);
    u |= sign;
  }
  memcpy(&f, &u, 4);
  return f;
}

static inline uint16_t float_to_f16(float f) {  // to nearest, ties to even
  uint32_t u;
  memcpy(&u, &f, 4);
  uint16_t sign = (uint16_t)(u >> 16 & 0x8000);
  u &= 0x7fffffff;
  if (u > 0x7f800000) return sign | 0x7e00;
  if (u >= 0x477ff000) return sign | 0x7c00;
  if (u < 0x38800000) {  // subnormal there: adding 1/2 rounds at the right bit
    float a;
    memcpy(&a, &u, 4);
    a += 0.5f;
    memcpy(&u, &a, 4);
    return sign | (uint16_t)(u - 0x3f000000);
  }
  return sign | (uint16_t)((u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13);
}

static inline void store(const Output& out, long at, const float* from, long count) {
  if (out.type == F32) {
    memcpy((float*)out.y + at, from, count * sizeof(float));
  } else if (out.type == BF16) {
    for (long i = 0; i < count; i++) ((uint16_t*)out.y)[at + i] = float_to_bf16(from[i]);
  } else {
    for (long i = 0; i < count; i++) ((uint16_t*)out.y)[at + i] = float_to_f16(from[i]);
  }
}

static inline void load(const void* x, int type, long at, float* to, long count) {
  if (type == F32) {
    memcpy(to, (const float*)x + at, count * sizeof(float));
  } else if (type == BF16) {
    for (long i = 0; i < count; i++) to[i] = bf16_to_float(((const uint16_t*)x)[at + i]);
  } else {
    for (long i = 0; i < count; i++) to[i] = f16_to_float(((const uint16_t*)x)[at + i]);
  }
}

// Groups of a weight, whose scales and zero points are searched.
struct Search {
  const void* w;  // [groups, size]
  int type;
  long size;
  const float* importance;  // [period, size], of the g-th group at g % period; null for equal weights
  long period;
  const float* shares;  // [steps], of the full range, and numbers up to a multiple of 16
  long steps;
  int bits, type_of_scale;
  bool symmetric;
  float *scale, *zero;  // [groups]
  uint8_t* doubtful;    // [groups], 1 where scale and zero point are left to PyTorch
};

// Groups of a weight, whose codes are packed one after another, low bits first.
struct Encoding {
  const void* w;  // [groups, size], size a multiple of 8
  int type;
  long size;
  const float *scale, *zero;  // [groups]
  int bits;
  uint8_t* codes;  // [groups, size / 8 * bits]
};

const long BLOCKS = 8;  // of W, that some columns of many rows of x stay in the second-level cache for

// Many rows of x in float32, some columns of all rows after others: [chunk of columns][m][COLUMNS].
const long COLUMNS = 128;
struct FloatRows {
  float* x;
  long m;
  float* at(long chunk, long row) const { return x + (chunk * m + row) * COLUMNS; }
};

static inline size_t rows_room(long m, long k) { return sizeof(float) * m * ((k + COLUMNS - 1) / COLUMNS * COLUMNS); }
static inline size_t panel_room(long m) { return sizeof(float) * (2 * COLUMNS * 16 + BLOCKS * 16 * m); }  // bytes a thread needs

// One instruction set: some blocks of 16 rows of a weight, in float32, or some of its groups.
// Words of 32 bits [rows, columns], and where their transpose is to be, with how many words lie between the beginnings of rows.
struct Words {
  const uint32_t* from;
  long rows, columns, stride;
  uint32_t* to;
  long to_stride;
};

struct Kernels {
  // y[m, 16 b ...] = x[m] @ W.T for blocks from, to (exclusive); x [m, k] and its sums over groups, [m, groups].
  void (*rows)(const Linear&, long from, long to, const float* x, const float* sums, long m, const Output&);
  long few;  // rows up to which that is faster than `panels`
  // The same with many rows: one of them, spread as `FloatRows` says; and all; room as `panel_room` says.
  void (*spread)(const void* x, int type, long k, long row, const FloatRows&);
  void (*panels)(const Linear&, long from, long to, const FloatRows&, float* room, const Output&);
  // W of those blocks: out [16 (to - from), k], less rows beyond n.
  void (*dequantize)(const Linear&, long from, long to, const Output&);
  // Groups from, ..., to - 1; room as `rounding_room` says.
  void (*search)(const Search&, long from, long to, uint8_t* room);
  void (*encode)(const Encoding&, long from, long to, uint8_t* room);
  // Portable codes of up to 16 rows, [n, k] in bytes, to the tiles of a block.
  void (*pack)(const uint8_t* rows, uint8_t* tiles, int bits, long n, long k);
  // Rows first, ..., last - 1 of a transpose.
  void (*turn)(const Words&, long first, long last);
  // Of columns first, ..., last - 1 the codes of four bits in words, see transpose.h.
  void (*turn_codes)(const Words&, uint32_t order, long first, long last);
};

// Bytes that a thread needs for groups of `size` columns and `steps` ranges, of which it searches up to 16 together.
static inline size_t rounding_room(long size, long steps) { return ((size + 16) * 2 + (steps + 16) * 7) * 16 * sizeof(float); }

extern const Kernels portable_kernels, avx2_kernels, avx512_kernels;

// Rows of x that are to be rounded to int8.
struct Activations {
  const void* x;  // [m, k]
  int type;
  const int32_t* columns;  // taken for zeros, `left` of them
  long left;
  const float* fixed;  // the scale, or null for one of each row
};

// VNNI, or SDOT of ARM: some rows of x as integers, of 16 bits (two digits) or int8 (one), with a scale for each tile of 32 columns.
struct Digits {
  int8_t* digits;  // [m, k / 32, digits, 32]: the high one first, in the order in which codes come out of a tile
  float* scale;    // [m, k / 32]
  int32_t* less;   // [m, k / 32]: what a code's offset of 2^(bits - 1) adds, negative
  float* sum;      // [m, k / 32]: of x
  int each;        // digits
};

// One row of x, bf16 or float16, in two digits; false where they cannot hold it: infinities, NaN,
// numbers next to nothing, or a few that are so large that the others would be rounded to too few bits.
bool byte_digits(const void* x, int type, long row, const Linear&, const Digits&);
// One row as int8; room for k floats.
void byte_int8(const Activations&, long row, const Linear&, float* room, const Digits&);
void byte_rows(const Linear&, long from, long to, const Digits&, long m, const Output&);
void matrix_rows(const Linear&, long from, long to, const Digits&, long m, const Output&);  // the same with SMMLA of ARM

// ARM with BFMMLA: x in bf16, pairs of rows with four columns of both side by side, some columns of all pairs after others:
// [chunk of columns][pair][COLUMNS / 4][2][4]. Beside the last of an odd number of rows lies anything: it changes no other row.
struct RowPairs {
  uint16_t* x;
  long m;
  long pairs() const { return (m + 1) / 2; }
  uint16_t* at(long chunk, long pair) const { return x + (chunk * pairs() + pair) * 2 * COLUMNS; }
};

static inline size_t pairs_room(long m, long k) { return sizeof(uint16_t) * (m + 1) * ((k + COLUMNS - 1) / COLUMNS * COLUMNS); }
void pairs_spread(const uint16_t* x, long k, long row, const RowPairs&);
void pairs_panels(const Linear&, long from, long to, const RowPairs&, uint8_t* room, const Output&);  // room as `panel_room` says

// Without AMX: x in tiles of a few rows, words of a pair of neighbouring columns in bf16 (AVX512-BF16) or of four in int8 (VNNI),
// some columns of all tiles after others: [chunk of columns][tile][word of the chunk][row of the tile].
const long TALL = 8;    // rows of a tile at most: with more, sums that are scaled wait for each other, with fewer, products
const long CHUNK = 16;  // times 32 columns
struct RowTiles {
  uint32_t* x;
  float* sums;    // [m, groups], where there are zero points
  float* scales;  // [m], of rows in int8
  long m, tiles, tall, taller;  // the rows; `tall` of them in a tile, and one more in the first `taller`
  bool scaled;  // whether weights are rounded to bf16, scales and all, or scales are applied to sums of codes, which are exact
  long words;  // of a row in 32 columns
  long first(long tile) const { return tile * tall + (tile < taller ? tile : taller); }
  long height(long tile) const { return tall + (tile < taller); }
  uint32_t* at(long t, long count, long tile) const { return x + (t * m + first(tile) * count) * words; }
};

void bf16_pack(const uint16_t* x, const Linear&, long tile, const RowTiles&);
void bf16_linear(const Linear&, long from, long to, const RowTiles&, uint8_t* room, const Output&);
// Row `first` of x on is the first of all tiles; room for k floats and k bytes.
void bytes_pack(const Activations& x, long first, const Linear&, long tile, float* room, const RowTiles&);
void bytes_linear(const Linear&, long from, long to, const RowTiles&, uint8_t* room, const Output&);
// Bytes a thread needs for blocks of W in a chunk and what becomes of BLOCKS of them, taken together for the second-level cache.
static inline size_t blocked_room(const RowTiles& x) {
  return CHUNK * x.words * 128 + sizeof(float) * BLOCKS / 2 * x.m * 32;
}

// AMX: x in tiles of 16 rows and 32 columns of bf16, `parts` of them (1: bf16; 2: float32 as a sum of two) side by side,
// the tiles of up to DEPTH steps of k together: [k / DEPTH][m][DEPTH][parts][1 KB].
const long DEPTH = 16, WIDE = 16;  // tiles of k at a time; blocks of 16 rows of W at a time

static inline size_t amx_tiles(long m_tiles, long k_tiles, int parts) {
  return (size_t)m_tiles * ((k_tiles + DEPTH - 1) / DEPTH * DEPTH) * parts * 1024;
}

// Where the columns of step t of k lie, of a tile of rows.
static inline size_t amx_place(long t, long m_tile, long m_tiles, int parts) {
  return (size_t)((t / DEPTH * m_tiles + m_tile) * DEPTH + t % DEPTH) * parts * 1024;
}

void amx_pack(const void* x, int type, long m, long k, int parts, long m_tile, long m_tiles, uint8_t* out);
void amx_linear(const Linear&, long from, long to, const uint8_t* x, long m, int parts, uint8_t* room, const Output&);
size_t amx_room(long m_tiles, int parts);  // bytes a thread needs
bool amx_allowed();

// AMX with int8: x in tiles of 16 rows and `unit` columns, their scales and, for zero points, the sums of their groups.
struct Int8Tiles {
  int8_t* codes;  // [k / depth][m / 16][depth / unit][16][unit], the depth that of `units`
  float* scale;   // [16 m_tiles]
  float* sum;     // [16 m_tiles, groups], of the integers
  long unit, m_tiles;
};

static inline long int8_unit(const Linear& a) { return a.group % 64 ? 32 : 64; }
void int8_pack(const Activations&, long m, const Linear&, long m_tile, float* room, const Int8Tiles&);
void int8_linear(const Linear&, long from, long to, const Int8Tiles&, long m, uint8_t* room, const Output&);
// One tile of rows as bf16, which holds int8 exactly, laid out for `amx_linear`: faster where groups are small.
void int8_as_bf16(const Activations&, long m, const Linear&, long m_tile, long m_tiles, float* room, uint8_t* out, float* scale);
size_t int8_tiles(const Linear&, long m_tiles);  // bytes of codes
size_t int8_room(const Linear&, long m_tiles);   // bytes a thread needs
