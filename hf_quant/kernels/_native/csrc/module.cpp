// The Python module: addresses in, numbers out. Shapes, dtypes and contiguity of tensors are checked in Python; here the
// numbers that say how far memory is read and written, and the values that memory is written by.
#define Py_LIMITED_API 0x030a0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>

#include <atomic>
#include <new>

#include "calls.h"
#include "cpu.h"
#include "layout.h"
#include "levels.h"
#include "rounding_calls.h"
#include "threads.h"

namespace {

// ---- products

const long FEW = 4, FEW_HALVES = 8, FEW_INT8 = 8;  // up to so many rows, vectors are as fast as AMX: float32, 16 bits, 8
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
  in_shares(a, threads, [&](long from, long to) { byte_rows(a, from, to, made, m, y); });
  return true;
}

bool few_halves(const Linear& a, const void* x, int type, long m, const Output& y, long threads) {
  return few_digits(a, 2, m, y, threads, [&](long i, const Digits& out) { return byte_digits(x, type, i, a, out); });
}

void few_int8(const Linear& a, const Activations& x, long m, const Output& y, long threads) {
  few_digits(a, 1, m, y, threads, [&](long i, const Digits& out) {
    byte_int8(x, i, a, (float*)own_room.of(sizeof(float) * a.k), out);
    return true;
  });
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

// f(from, to) for blocks of W, shared out in `parts` for each thread, or more.
template <class F>
void in_blocks(const Linear& a, long parts, long threads, F f) {
  long blocks = (a.blocks() + parts * threads - 1) / (parts * threads);
  blocks = blocks > WIDE ? WIDE : (blocks + 1) / 2 * 2;
  each((a.blocks() + blocks - 1) / blocks, threads,
       [&](long j) { f(j * blocks, (j + 1) * blocks < a.blocks() ? (j + 1) * blocks : a.blocks()); });
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

// How many of m rows to take together: the fewer are left over in the last tile the better, and the fewer tiles.
long tallest(long m) {
  long best = m < TALL ? m : TALL, least = m * 1000;
  for (long tall = best; tall > TALL / 2 && m > TALL; tall--) {
    const long tiles = (m + tall - 1) / tall, cost = tiles * (10 * tall + 3);
    if (cost < least) least = cost, best = tall;
  }
  return best;
}

// Without AMX: rows of x in bf16, as many at a time as their part of a chunk leaves room for in the second-level cache.
void many_halves(const Linear& a, const uint16_t* x, const Output& y, long m, long threads) {
  const long passes = (m + 511) / 512;
  for (long p = 0; p < passes; p++) {
    const long first = m * p / passes, rows = m * (p + 1) / passes - first;
    const long tall = tallest(rows), all = (rows + tall - 1) / tall * tall;
    uint32_t* at = (uint32_t*)shared_room.of(sizeof(float) * all * (a.k / 2 + (a.zero ? a.groups() : 0)));
    const bool scaled = a.group < 64 || rows >= 256;  // sums to be scaled would take longer than what it takes to scale weights
    const RowTiles packed = {at, (float*)(at + all * a.k / 2), rows, tall, scaled, scaled ? 16 : 8};
    each(packed.tiles(), threads, [&](long j) { bf16_pack(x + first * a.k, a, j, packed); });
    const Output to = {(uint16_t*)y.y + first * a.n, y.type};
    in_blocks(a, 4, threads, [&](long from, long end) {
      bf16_linear(a, from, end, packed, own_room.of(bf16_room(packed)), to);
    });
  }
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

// ---- Python

// Whether scales and zero points are of types that there are, and go together.
bool scaled(const Linear& w) {
  const bool halves = w.scale_type >= F32 && w.scale_type <= F16;
  if (w.unit) {
    if (w.shift < 0 || w.shift >= 8 || w.groups() % (1 << w.shift) || w.scale_type != BYTE) return false;
    return !w.zero ? !w.zero_unit : w.zero_unit && w.zero_type == BYTE && w.subtracted;
  }
  if (w.zero_unit || (!halves && w.scale_type != ONE)) return false;
  return !w.zero || (halves && w.zero_type >= F32 && w.zero_type <= BYTE && !(w.subtracted && w.zero_type == BYTE));
}

// The weight and the integers of a call. A weight is bytes, 13 integers of 64 bits: as many objects of Python would have to
// come from memory one after the other at every token.
bool with_weight(const char* name, PyObject* const* args, Py_ssize_t given, Py_ssize_t wanted, Linear* w, long long* out) {
  long long a[13];
  if (given < 1 || !PyBytes_Check(args[0]) || PyBytes_Size(args[0]) != sizeof a) {
    PyErr_Format(PyExc_TypeError, "%s takes a weight of %zu bytes first", name, sizeof a);
    return false;
  }
  memcpy(a, PyBytes_AsString(args[0]), sizeof a);
  w->q = (const uint8_t*)a[0], w->scale = (const void*)a[1], w->zero = (const void*)a[2];
  w->scale_type = (int)a[3], w->bits = (int)a[4], w->n = (long)a[5], w->k = (long)a[6], w->group = (long)a[7];
  w->unit = (const float*)a[8], w->zero_unit = (const float*)a[9], w->shift = (int)a[10];
  w->zero_type = (int)a[11], w->subtracted = a[12] != 0;
  if (!is_width(w->bits) || w->n < 1 || w->k < 32 || w->group < 32 || w->group % 32 || w->k % w->group || !w->q || !w->scale ||
      !scaled(*w)) {
    PyErr_Format(PyExc_ValueError, "%s: no weight has %d bits, %ld rows, %ld columns in groups of %ld and scales of type %d",
                 name, w->bits, w->n, w->k, w->group, w->scale_type);
    return false;
  }
  return integers(name, args + 1, given - 1, wanted, out);
}

// Whether x, of m rows, can be read as `type` says; false with an exception set where it cannot.
bool readable(const char* name, const void* x, long m, int type) {
  if (m == 0 || (m > 0 && x && type >= F32 && type <= F16)) return true;
  PyErr_Format(PyExc_ValueError, "%s: %ld rows at %p of type %d", name, m, x, type);
  return false;
}

PyObject* py_linear(PyObject*, PyObject* const* args, Py_ssize_t given) {
  long long a[5];
  Linear w;
  if (!with_weight("linear", args, given, 5, &w, a)) return nullptr;
  const void* x = (const void*)a[0];
  const Output y = {(void*)a[1], (int)a[2]};
  const long m = (long)a[3], threads = (long)a[4];
  if (!readable("linear", x, m, y.type)) return nullptr;
  return unlocked([&] {
#if defined(BYTES)
    const bool halves = level >= BYTE_PRODUCTS && y.type != F32;
#endif
#if defined(__x86_64__)
    if (level == AMX && m > (halves ? FEW_HALVES : FEW))
      many_rows(w, (const uint8_t*)x, y, m, threads);
    else if (level == HALVES && y.type == BF16 && m > FEW_HALVES)
      many_halves(w, (const uint16_t*)x, y, m, threads);
    else
#endif
#if defined(BYTES)
    if (!halves || !few_halves(w, x, y.type, m, y, threads))
#endif
      few_rows(w, x, y.type, m, y, threads);
  });
}

PyObject* py_dequantize(PyObject*, PyObject* const* args, Py_ssize_t given) {
  long long a[5];
  Linear w;
  if (!with_weight("dequantize", args, given, 5, &w, a)) return nullptr;
  const long from = (long)a[0], to = (long)a[1], threads = (long)a[4];
  const int type = (int)a[3];
  if (from < 0 || to > w.blocks() || !readable("dequantize", (const void*)a[2], 1, type)) {
    if (!PyErr_Occurred()) PyErr_Format(PyExc_ValueError, "dequantize: blocks %ld to %ld of %ld", from, to, w.blocks());
    return nullptr;
  }
  return unlocked([&] {
    each(to - from, threads, [&](long i) {
      const Output out = {(uint8_t*)a[2] + 16 * i * w.k * (type == F32 ? 4 : 2), type};
      kernels().dequantize(w, from + i, from + i + 1, out);
    });
  });
}

// Whether every column that is left out is there, and a fixed scale can be divided by; false with an exception set.
bool sound(const Linear& w, const int32_t* columns, long left, const float* fixed) {
  for (long j = 0; j < left; j++)
    if (columns[j] < 0 || columns[j] >= w.k) {
      PyErr_Format(PyExc_ValueError, "outlier column %d: there are columns 0 to %ld", (int)columns[j], w.k - 1);
      return false;
    }
  if (fixed && !(*fixed > 0 && *fixed <= 3.4028234e38f)) {
    PyErr_SetString(PyExc_ValueError, "the scale of the activations must be a finite number above 0");
    return false;
  }
  return true;
}

PyObject* py_int8_linear(PyObject*, PyObject* const* args, Py_ssize_t given) {
  long long a[8];
  Linear w;
  if (!with_weight("int8_linear", args, given, 8, &w, a)) return nullptr;
  if (w.unit || w.subtracted) {
    PyErr_SetString(PyExc_ValueError, "int8_linear: scales in two levels, or what is subtracted from scaled codes");
    return nullptr;
  }
  if (level < BYTE_PRODUCTS) {
    PyErr_Format(PyExc_RuntimeError, "products of bytes need %s, this is %s", NAMES[BYTE_PRODUCTS], NAMES[level]);
    return nullptr;
  }
#if defined(BYTES)
  const Activations x = {(const void*)a[0], (int)a[2], (const int32_t*)a[5], (long)a[6], (const float*)a[7]};
  const Output y = {(void*)a[1], (int)a[2]};
  const long m = (long)a[3], threads = (long)a[4];
  if (!readable("int8_linear", x.x, m, x.type) || !sound(w, x.columns, x.left, x.fixed)) return nullptr;
  return unlocked([&] {
#if defined(__x86_64__)
    if (level == AMX && m > FEW_INT8) return many_int8(w, x, y, m, threads);
#endif
    few_int8(w, x, m, y, threads);
  });
#else
  Py_RETURN_NONE;
#endif
}

template <void (*ONE)(const uint8_t*, uint8_t*, int, long, long), bool FORTH>
PyObject* py_layout(PyObject*, PyObject* const* args, Py_ssize_t given) {
  long long a[6];
  const char* name = FORTH ? "pack" : "unpack";
  if (!integers(name, args, given, 6, a)) return nullptr;
  const int bits = (int)a[2];
  const long n = (long)a[3], k = (long)a[4];
  if (!is_width(bits) || n < 1 || k < 32 || k % 32 || !a[0] || !a[1]) {
    PyErr_Format(PyExc_ValueError, "%s: no weight has %d bits, %ld rows and %ld columns", name, bits, n, k);
    return nullptr;
  }
  return unlocked([&] {
    each((n + 15) / 16, (long)a[5], [&](long b) {
      const long there = 16 * b * (k * bits / 8), here = b * (k / 32) * 64 * bits;
      const long count = n - 16 * b < 16 ? n - 16 * b : 16;
      ONE((const uint8_t*)a[0] + (FORTH ? there : here), (uint8_t*)a[1] + (FORTH ? here : there), bits, count, k);
    });
  });
}

PyObject* py_limit(PyObject*, PyObject* name) {
  const char* wanted = PyUnicode_AsUTF8AndSize(name, nullptr);
  if (!wanted) return nullptr;
  for (int i = 0; i <= LAST; i++)
    if (!strcmp(wanted, NAMES[i])) {
      level = i < best ? i : best;
      Py_RETURN_NONE;
    }
  PyErr_Format(PyExc_ValueError, "must be one of the levels from %s to %s, got %R", NAMES[PORTABLE], NAMES[LAST], name);
  return nullptr;
}

PyObject* py_level(PyObject*, PyObject*) { return PyUnicode_FromString(NAMES[level]); }
PyObject* py_threaded(PyObject*, PyObject*) { return PyBool_FromLong(parallel != nullptr); }

#define FAST(f) (PyCFunction)(void (*)(void)) f, METH_FASTCALL
PyMethodDef methods[] = {
    {"linear", FAST(py_linear), "linear(weight, x, y, type, m, threads); a weight is q, scale, zero, scale_type, bits, n, k, group, unit, zero_unit, shift"},
    {"dequantize", FAST(py_dequantize), "dequantize(weight, first block, end, out, type, threads)"},
    {"int8_linear", FAST(py_int8_linear), "int8_linear(weight, x, y, type, m, threads, columns, count, fixed)"},
    {"pack", FAST((py_layout<pack_block, true>)), "pack(codes, tiles, bits, n, k, threads)"},
    {"unpack", FAST((py_layout<unpack_block, false>)), "unpack(tiles, codes, bits, n, k, threads)"},
    {"search", FAST(py_search), "search(groups, type, count, size, importance, period, shares, steps, bits, symmetric, scale_type, scale, zero, doubtful, threads)"},
    {"encode", FAST(py_encode), "encode(groups, type, count, size, scale, zero, bits, codes, threads)"},
    {"limit", py_limit, METH_O, "Use no more than this instruction set."},
    {"level", py_level, METH_NOARGS, "The instruction set in use."},
    {"threaded", py_threaded, METH_NOARGS, "Whether PyTorch's threads are used."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cpu", "Products with packed codes on CPUs.", -1, methods,
                          nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu(void) {
  best = level = detect();
  parallel = (Parallel)dlsym(RTLD_DEFAULT, "GOMP_parallel");
  return PyModule_Create(&definition);
}
