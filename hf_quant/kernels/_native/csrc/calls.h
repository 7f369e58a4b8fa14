// What calls of the module have in common. Included by the module alone, after Python.h.
#pragma once
#include <new>

namespace {

// Integers out of a call's arguments; false with an exception set.
bool integers(const char* name, PyObject* const* args, Py_ssize_t given, Py_ssize_t wanted, long long* out) {
  if (given != wanted) {
    PyErr_Format(PyExc_TypeError, "%s takes %zd integers, got %zd", name, wanted, given);
    return false;
  }
  for (Py_ssize_t i = 0; i < wanted; i++) {
    out[i] = PyLong_AsLongLong(args[i]);
    if (out[i] == -1 && PyErr_Occurred()) return false;
  }
  return true;
}

bool is_width(int bits) { return bits >= 2 && bits <= 8; }

// Runs f without Python's lock; null with an exception set where memory ran out, else None.
template <class F>
PyObject* unlocked(F f) {
  bool done = true;
  Py_BEGIN_ALLOW_THREADS;
  try {
    f();
  } catch (const std::bad_alloc&) {
    done = false;
  }
  Py_END_ALLOW_THREADS;
  if (!done) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

}  // namespace
