// How products are shared out among threads, in which parts, and what they need packed. Included by the module alone.
#pragma once
#include <atomic>

#include "cpu.h"
#include "levels.h"
#include "threads.h"

namespace {

const long FEW = 4, FEW_HALVES = 8, FEW_INT8 = 8;  // up to so many rows, vectors are as fast as AMX: float32, 16 bits, 8
const long FEW_WORDS = 6;  // the same beside `in_passes`
const long FEW_PAIRS = 8;  // and beside `many_pairs`, which nothing has timed
const long MOST = 16 << 20;  // bytes of x that are packed at a time

// f(from, to) for blocks of W, in a few shares for each thread.
template <class F>
void in_shares(const Linear& a, long threads, F f) {
  const long parts = threads * 4 < a.blocks() ? threads * 4 : a.blocks();
  each(parts, threads, [&](long i) { f(a.blocks() * i / parts, a.blocks() * (i + 1) / parts); });
}

void few_rows(const Linear& a, const void* x, int type, long m, const Output& y, long threads) {
  const long groups = a.groups();
  float* wide = (float*)shared_room.of(sizeof(float) * m * (a.k + groups));
  float* sums = wide + m * a.k;
  each(m, m * a.k > 1 << 16 ? threads : 1, [=](long i) {
    load(x, type, i * a.k, wide + i * a.k, a.k);
    if (a.zero)
      for (long g = 0; g < groups; g++) {
        float s[8] = {};
        for (long j = 0; j < a.group; j++) s[j % 8] += wide[i * a.k + g * a.group + j];
        sums[i * groups + g] = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
      }
  });
  const Kernels& set = kernels();
  in_shares(a, threads, [&](long from, long to) { set.rows(a, from, to, wide, sums, m, y); });
}

#if defined(BYTES)
// The same as products of bytes, x in one digit or two; false, and nothing done, where fill(row, digits) is for some row.
template <class F>
bool few_digits(const Linear& a, int digits, long m, const Output& y, long threads, F fill) {
  const long count = m * a.tiles();
  uint8_t* at = shared_room.of(count * (32 * digits + 3 * 4));
  float* scale = (float*)(at + count * 32 * digits);
  const Digits made = {(int8_t*)at, scale, (int32_t*)(scale + count), scale + 2 * count, digits};
  std::atomic<bool> fit{true};
  each(m, m * a.k > 1 << 16 ? threads : 1, [&](long i) {
    if (!fill(i, made)) fit = false;
  });
  if (!fit) return false;
#if defined(__aarch64__)
  const auto rows = level >= I8MM && m > 1 ? matrix_rows : byte_rows;
#else
  const auto rows = byte_rows;
#endif
  in_shares(a, threads, [&](long from, long to) { rows(a, from, to, made, m, y); });
  return true;
}

bool few_halves(const Linear& a, const void* x, int type, long m, const Output& y, long threads) {
  return few_digits(a, 2, m, y, threads, [&](long i, const Digits& out) { return byte_digits(x, type, i, a, out); });
}

// Up to how many rows that is fastest: in small groups, digits are scaled more often than what they save.
long few_halves_most(const Linear& a) {
#if defined(__x86_64__)
  if (level == AMX) return FEW_HALVES;
#endif
  return a.group < 128 ? 4 : 32;
}

void few_int8(const Linear& a, const Activations& x, long m, const Output& y, long threads) {
  few_digits(a, 1, m, y, threads, [&](long i, const Digits& out) {
    byte_int8(x, i, a, (float*)own_room.of(sizeof(float) * a.k), out);
    return true;
  });
}
#endif

// f(from, to) for blocks of W, shared out in `parts` for each thread, or more.
template <class F>
void in_blocks(const Linear& a, long parts, long threads, F f) {
  long blocks = (a.blocks() + parts * threads - 1) / (parts * threads);
  blocks = blocks > WIDE ? WIDE : (blocks + 1) / 2 * 2;
  each((a.blocks() + blocks - 1) / blocks, threads,
       [&](long j) { f(j * blocks, (j + 1) * blocks < a.blocks() ? (j + 1) * blocks : a.blocks()); });
}

// Many rows of x, some at a time. Rows{room, how many} is what they are spread to: spread(their place in x, row, Rows), and
// product(blocks from, to, Rows, room, output).
template <class Rows, class S, class P>
void in_panels(const Linear& a, const void* x, long m, const Output& y, long threads, size_t (*room)(long, long), S spread, P product) {
  const long size = y.type == F32 ? 4 : 2, fit = MOST / (a.k * (long)sizeof(float)), most = fit < 64 ? 64 : fit > 512 ? 512 : fit;
  const long passes = (m + most - 1) / most;
  for (long p = 0; p < passes; p++) {
    const long first = m * p / passes, rows = m * (p + 1) / passes - first;
    Rows packed = {};
    packed.x = (decltype(packed.x))shared_room.of(room(rows, a.k)), packed.m = rows;
    const void* from = (const uint8_t*)x + first * a.k * size;
    each(rows, rows * a.k > 1 << 16 ? threads : 1, [&](long i) { spread(from, i, packed); });
    const Output to = {(uint8_t*)y.y + first * a.n * size, y.type};
    in_blocks(a, 4, threads, [&](long b, long end) { product(b, end, packed, own_room.of(panel_room(rows)), to); });
  }
}

// With vectors alone, which every processor has.
void many_floats(const Linear& a, const void* x, int type, long m, const Output& y, long threads) {
  const Kernels& set = kernels();
  in_panels<FloatRows>(
      a, x, m, y, threads, rows_room, [&](const void* from, long i, const FloatRows& to) { set.spread(from, type, a.k, i, to); },
      [&](long b, long end, const FloatRows& rows, uint8_t* room, const Output& to) { set.panels(a, b, end, rows, (float*)room, to); });
}

#if defined(__aarch64__)
// In bf16, with BFMMLA.
void many_pairs(const Linear& a, const uint16_t* x, long m, const Output& y, long threads) {
  in_panels<RowPairs>(
      a, x, m, y, threads, pairs_room,
      [&](const void* from, long i, const RowPairs& to) { pairs_spread((const uint16_t*)from, a.k, i, to); },
      [&](long b, long end, const RowPairs& rows, uint8_t* room, const Output& to) { pairs_panels(a, b, end, rows, room, to); });
}
#endif

#if defined(__x86_64__)
// A few rows of x at a time, from the i-th on: what `many_rows` and `many_int8` do.
template <class F>
void in_parts(const Linear& a, long m, long bytes, F f) {
  long step = MOST / (a.k * bytes) / 32 * 32;
  step = step < 32 ? 32 : step > 512 ? 512 : step;
  for (long i = 0; i < m; i += step) f(i, m - i < step ? m - i : step);
}

void many_rows(const Linear& a, const uint8_t* x, const Output& y, long m, long threads) {
  const int parts = y.type == BF16 ? 1 : 2;
  const long size = y.type == F32 ? 4 : 2;
  in_parts(a, m, 2 * parts, [&](long i, long rows) {
    const long m_tiles = (rows + 15) / 16;
    uint8_t* packed = shared_room.of(amx_tiles(m_tiles, a.tiles(), parts));
    each(m_tiles, threads, [=](long j) { amx_pack(x + i * a.k * size, y.type, rows, a.k, parts, j, m_tiles, packed); });
    const Output to = {(uint8_t*)y.y + i * a.n * size, y.type};
    in_blocks(a, 2, threads, [&](long from, long end) {
      amx_linear(a, from, end, packed, rows, parts, own_room.of(amx_room(m_tiles, parts)), to);
    });
  });
}

// Blocks of W that a thread takes together, up to BLOCKS: those that leave the fewest to the thread that has the most.
long together(long blocks, long threads) {
  long best = BLOCKS, least = 0;
  for (long some = BLOCKS; some >= 2; some -= 2) {
    const long rounds = ((blocks + some - 1) / some + threads - 1) / threads;
    const long cost = rounds + (threads > 1 ? rounds * some : blocks);
    if (!least || cost < least) least = cost, best = some;
  }
  return best;
}

// Without AMX: as many rows of x at a time as their part of a chunk leaves room for in the second-level cache. pack(first row,
// tile, tiles of x), and product(first row, blocks from, to, tiles of x, room).
template <class P, class F>
void in_passes(const Linear& a, long m, long threads, bool halves, P pack, F product) {
  const long passes = (m + 511) / 512, words = halves ? 16 : 8;
  for (long p = 0; p < passes; p++) {
    const long first = m * p / passes, rows = m * (p + 1) / passes - first, tiles = (rows + TALL - 1) / TALL;
    const long size = rows * a.tiles() * words;
    uint32_t* at = (uint32_t*)shared_room.of(sizeof(float) * (size + rows * (1 + (a.zero ? a.groups() : 0))));
    float* scales = (float*)(at + size);
    const bool scaled = halves && (a.group < 64 || rows >= 256);  // sums to be scaled would take longer than what it takes to scale weights
    const RowTiles packed = {at, scales + rows, scales, rows, tiles, rows / tiles, rows % tiles, scaled, words};
    each(tiles, threads, [&](long j) { pack(first, j, packed); });
    const long some = together(a.blocks(), threads);
    each((a.blocks() + some - 1) / some, threads, [&](long j) {
      const long from = j * some, to = from + some < a.blocks() ? from + some : a.blocks();
      product(first, from, to, packed, own_room.of(blocked_room(packed)));
    });
  }
}

void many_halves(const Linear& a, const uint16_t* x, const Output& y, long m, long threads) {
  in_passes(
      a, m, threads, true, [&](long first, long j, const RowTiles& out) { bf16_pack(x + first * a.k, a, j, out); },
      [&](long first, long from, long to, const RowTiles& x, uint8_t* room) {
        bf16_linear(a, from, to, x, room, {(uint16_t*)y.y + first * a.n, y.type});
      });
}

void many_bytes(const Linear& a, const Activations& x, const Output& y, long m, long threads) {
  const long size = x.type == F32 ? 4 : 2;
  in_passes(
      a, m, threads, false,
      [&](long first, long j, const RowTiles& out) { bytes_pack(x, first, a, j, (float*)own_room.of((4 + TALL) * a.k), out); },
      [&](long first, long from, long to, const RowTiles& x, uint8_t* room) {
        bytes_linear(a, from, to, x, room, {(uint8_t*)y.y + first * a.n * size, y.type});
      });
}

void many_int8(const Linear& a, const Activations& x, const Output& y, long m, long threads) {
  const long size = x.type == F32 ? 4 : 2;
  const bool small = a.groups() > 1 && a.group < 64 && a.bits < 8;  // beside whose own error that of bf16 is nothing
  in_parts(a, m, small ? 2 : 1, [&](long i, long rows) {
    const long m_tiles = (rows + 15) / 16;
    const size_t bytes = small ? amx_tiles(m_tiles, a.tiles(), 1) : int8_tiles(a, m_tiles);
    uint8_t* at = shared_room.of(bytes + sizeof(float) * 16 * m_tiles * (1 + a.groups()));
    float* scale = (float*)(at + bytes);
    const Int8Tiles packed = {(int8_t*)at, scale, scale + 16 * m_tiles, int8_unit(a), m_tiles};
    const Activations part = {(const uint8_t*)x.x + i * a.k * size, x.type, x.columns, x.left, x.fixed};
    const Output to = {(uint8_t*)y.y + i * a.n * size, y.type, small ? scale : nullptr};
    each(m_tiles, threads, [&](long j) {
      float* row = (float*)own_room.of(sizeof(float) * a.k);
      if (small)
        int8_as_bf16(part, rows, a, j, m_tiles, row, at, scale);
      else
        int8_pack(part, rows, a, j, row, packed);
    });
    in_blocks(a, small ? 2 : 16, threads, [&](long from, long end) {
      if (small)
        amx_linear(a, from, end, at, rows, 1, own_room.of(amx_room(m_tiles, 1)), to);
      else
        int8_linear(a, from, end, packed, rows, own_room.of(int8_room(a, m_tiles)), to);
    });
  });
}
#endif

}  // namespace
