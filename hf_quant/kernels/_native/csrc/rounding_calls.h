// Rounding, called from Python. Included by the module alone.
#pragma once
#include "calls.h"
#include "cpu.h"
#include "levels.h"
#include "threads.h"

namespace {

// Whether groups can be read and rounded; false with an exception set where they cannot.
bool is_groups(const char* name, const void* w, int type, long count, long size, int bits) {
  if (w && type >= F32 && type <= F16 && count >= 0 && size >= 1 && is_width(bits)) return true;
  PyErr_Format(PyExc_ValueError, "%s: no weight has %ld groups of %ld at %p of type %d, in %d bits", name, count, size, w, type, bits);
  return false;
}

// f(from, to, room) for groups, some of them at a time.
template <class F>
PyObject* for_groups(long count, long size, long steps, long threads, F f) {
  const long some = size < (1 << 11) ? (1 << 15) / size : 16;
  return unlocked([&] {
    each((count + some - 1) / some, threads, [&](long i) {
      f(i * some, (i + 1) * some < count ? (i + 1) * some : count, own_room.of(rounding_room(size, steps)));
    });
  });
}

PyObject* py_search(PyObject*, PyObject* const* args, Py_ssize_t given) {
  long long a[15];
  if (!integers("search", args, given, 15, a)) return nullptr;
  const Search s = {(const void*)a[0], (int)a[1], (long)a[3], (const float*)a[4], (long)a[5], (const float*)a[6], (long)a[7],
                    (int)a[8], (int)a[10], a[9] != 0, (float*)a[11], (float*)a[12], (uint8_t*)a[13]};
  const long count = (long)a[2];
  if (!is_groups("search", s.w, s.type, count, s.size, s.bits)) return nullptr;
  if ((s.importance && s.period < 1) || s.steps < 0 || (s.steps && !s.shares) || s.type_of_scale < F32 || s.type_of_scale > F16 ||
      !s.scale || !s.zero || !s.doubtful) {
    PyErr_Format(PyExc_ValueError, "search: %ld steps, importance of %ld groups, scales of type %d", s.steps, s.period, s.type_of_scale);
    return nullptr;
  }
  return for_groups(count, s.size, s.steps, (long)a[14], [&](long from, long to, uint8_t* room) { kernels().search(s, from, to, room); });
}

PyObject* py_encode(PyObject*, PyObject* const* args, Py_ssize_t given) {
  long long a[9];
  if (!integers("encode", args, given, 9, a)) return nullptr;
  const Encoding e = {(const void*)a[0], (int)a[1], (long)a[3], (const float*)a[4], (const float*)a[5], (int)a[6], (uint8_t*)a[7]};
  const long count = (long)a[2];
  if (!is_groups("encode", e.w, e.type, count, e.size, e.bits)) return nullptr;
  if (e.size % 8 || !e.scale || !e.zero || !e.codes) {
    PyErr_Format(PyExc_ValueError, "encode: groups of %ld are no multiple of 8 columns, or something is null", e.size);
    return nullptr;
  }
  return for_groups(count, e.size, 0, (long)a[8], [&](long from, long to, uint8_t* room) { kernels().encode(e, from, to, room); });
}

}  // namespace
