// The Python module: addresses in, numbers out. Shapes, dtypes and contiguity of tensors are checked in Python; here the
// numbers that say how far memory is read and written, and the values that memory is written by.
#define Py_LIMITED_API 0x030a0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>

#include <new>

#include "calls.h"
#include "cpu.h"
#include "layout.h"
#include "levels.h"
#include "products.h"
#include "rounding_calls.h"
#include "threads.h"

namespace {

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
    if (level == AMX && m > (halves ? FEW_HALVES : FEW)) return many_rows(w, (const uint8_t*)x, y, m, threads);
    if (level == HALVES && y.type == BF16 && m > FEW_WORDS) return many_halves(w, (const uint16_t*)x, y, m, threads);
#endif
#if defined(__aarch64__)
    if (level == HALVES && y.type == BF16 && m > FEW_PAIRS) return many_pairs(w, (const uint16_t*)x, m, y, threads);
#endif
#if defined(BYTES)
    if (halves && m <= few_halves_most(w) && few_halves(w, x, y.type, m, y, threads)) return;
#endif
    (m > kernels().few ? many_floats : few_rows)(w, x, y.type, m, y, threads);
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
    if (m > FEW_WORDS) return many_bytes(w, x, y, m, threads);
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

void pack_here(const uint8_t* rows, uint8_t* tiles, int bits, long n, long k) { kernels().pack(rows, tiles, bits, n, k); }

// Words as they are, or, with an `order`, the codes of four bits in them.
PyObject* py_turn(PyObject*, PyObject* const* args, Py_ssize_t given) {
  long long a[8];
  if (!integers("turn", args, given, 8, a)) return nullptr;
  const Words words = {(const uint32_t*)a[0], (long)a[1], (long)a[2], (long)a[3], (uint32_t*)a[4], (long)a[5]};
  const uint32_t order = (uint32_t)a[6];
  const long columns = words.columns, wide = order ? words.rows / 8 : words.rows, some = order ? 32 : 256;
  if (words.rows < 1 || columns < 1 || words.stride < columns || words.to_stride < wide || !words.from || !words.to || (order && words.rows % 8)) {
    PyErr_Format(PyExc_ValueError, "turn: no words in %ld rows, %ld apart, and %ld columns", words.rows, words.stride, columns);
    return nullptr;
  }
  return unlocked([&] {
    each((columns + some - 1) / some, (long)a[7], [&](long i) {
      const long first = i * some, last = columns - first < some ? columns : first + some;
      order ? kernels().turn_codes(words, order, first, last) : kernels().turn(words, first, last);
    });
  });
}

PyObject* py_blocks(PyObject*, PyObject* const* args, Py_ssize_t given) {
  long long a[6];
  if (!integers("blocks", args, given, 6, a)) return nullptr;
  const long size = (long)a[2], n = (long)a[3], groups = (long)a[4];
  if ((size != 1 && size != 2 && size != 4) || n < 1 || groups < 1 || !a[0] || !a[1]) {
    PyErr_Format(PyExc_ValueError, "blocks: no values of %ld bytes in %ld rows of %ld", size, n, groups);
    return nullptr;
  }
  return unlocked([&] {
    each((n + 15) / 16, (long)a[5], [&](long b) {
      const long at = 16 * b * groups, count = n - 16 * b < 16 ? n - 16 * b : 16;
      if (size == 1) pack_values((const uint8_t*)a[0] + at, (uint8_t*)a[1] + at, count, groups);
      if (size == 2) pack_values((const uint16_t*)a[0] + at, (uint16_t*)a[1] + at, count, groups);
      if (size == 4) pack_values((const uint32_t*)a[0] + at, (uint32_t*)a[1] + at, count, groups);
    });
  });
}

PyObject* py_finite(PyObject*, PyObject* const* args, Py_ssize_t given) {
  long long a[4];
  if (!integers("finite", args, given, 4, a)) return nullptr;
  const int type = (int)a[1];
  const long count = (long)a[2], some = 1 << 16;
  if (type < F32 || type > F16 || count < 0 || (count && !a[0])) {
    PyErr_Format(PyExc_ValueError, "finite: %ld numbers of type %d", count, type);
    return nullptr;
  }
  std::atomic<bool> odd{false};
  PyObject* done = unlocked([&] {
    each((count + some - 1) / some, (long)a[3], [&](long i) {
      const long at = i * some, size = count - at < some ? count - at : some;
      const bool finite = type == F32 ? all_finite<uint32_t>((const uint32_t*)a[0] + at, size, 0x7f800000u)
                                      : all_finite<uint16_t>((const uint16_t*)a[0] + at, size, type == BF16 ? 0x7f80 : 0x7c00);
      if (!finite) odd = true;
    });
  });
  if (!done) return nullptr;
  Py_DECREF(done);
  return PyBool_FromLong(!odd);
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
PyObject* py_sources(PyObject*, PyObject*) { return PyUnicode_FromString(SOURCES); }
PyObject* py_threaded(PyObject*, PyObject*) { return PyBool_FromLong(parallel != nullptr); }

#define FAST(f) (PyCFunction)(void (*)(void)) f, METH_FASTCALL
PyMethodDef methods[] = {
    {"linear", FAST(py_linear), "linear(weight, x, y, type, m, threads); a weight is q, scale, zero, scale_type, bits, n, k, group, unit, zero_unit, shift"},
    {"dequantize", FAST(py_dequantize), "dequantize(weight, first block, end, out, type, threads)"},
    {"int8_linear", FAST(py_int8_linear), "int8_linear(weight, x, y, type, m, threads, columns, count, fixed)"},
    {"pack", FAST((py_layout<pack_here, true>)), "pack(codes, tiles, bits, n, k, threads)"},
    {"turn", FAST(py_turn), "turn(words, rows, columns, stride, to, stride, order of codes or 0, threads)"},
    {"unpack", FAST((py_layout<unpack_block, false>)), "unpack(tiles, codes, bits, n, k, threads)"},
    {"blocks", FAST(py_blocks), "blocks(values, blocks, bytes of one, rows, groups, threads)"},
    {"finite", FAST(py_finite), "finite(numbers, type, count, threads)"},
    {"search", FAST(py_search), "search(groups, type, count, size, importance, period, shares, steps, bits, symmetric, scale_type, scale, zero, doubtful, threads)"},
    {"encode", FAST(py_encode), "encode(groups, type, count, size, scale, zero, bits, codes, threads)"},
    {"limit", py_limit, METH_O, "Use no more than this instruction set."},
    {"level", py_level, METH_NOARGS, "The instruction set in use."},
    {"sources", py_sources, METH_NOARGS, "Which sources this was compiled from."},
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
