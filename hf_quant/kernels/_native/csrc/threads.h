// Threads, and the memory that each of them keeps. Included by the module alone.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <atomic>
#include <new>

namespace {

// Those of the OpenMP runtime that PyTorch brought, since a second pool would spin beside the first

typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);
Parallel parallel = nullptr;

const int SHARES = 64;

template <class F>
struct Job {
  F& f;
  long count;
  int shares;
  std::atomic<int> comers{0};
  std::atomic<bool> failed{false};  // to get memory; nothing is thrown through the OpenMP runtime
  struct alignas(64) {
    std::atomic<long> next;
  } share[SHARES];
  Job(F& f, long count, int shares) : f(f), count(count), shares(shares) {
    for (int i = 0; i < shares; i++) share[i].next = count * i / shares;
  }
  // A thread's own share in order, as memory is read fastest, then what is left of the others'.
  static void run(void* self) {
    Job& job = *(Job*)self;
    const int own = job.comers.fetch_add(1);
    for (int i = 0; i < job.shares; i++) {
      const int s = (own + i) % job.shares;
      const long end = job.count * (s + 1) / job.shares;
      for (long at; (at = job.share[s].next.fetch_add(1)) < end;) try {
          job.f(at);
        } catch (const std::bad_alloc&) {
          job.failed = true;
        }
    }
  }
};

// Calls f(0), ..., f(count - 1) from all available threads. Throws std::bad_alloc if one of the calls did.
template <class F>
void each(long count, long threads, F f) {
  if (threads > count) threads = count;
  if (!parallel || threads <= 1) {
    for (long i = 0; i < count; i++) f(i);
    return;
  }
  Job<F> job(f, count, (int)(threads < SHARES ? threads : SHARES));
  parallel(Job<F>::run, &job, (unsigned)threads, 0);
  if (job.failed) throw std::bad_alloc();
}

const size_t LARGE = 2 << 20;  // bytes of a large page

// Memory of one thread that stays: fresh pages would cost more than the products of a few rows. Much of it lies in large
// pages: small ones, wherever they happen to be, may all want the same places of a cache.
struct Room {
  uint8_t* at = nullptr;
  size_t size = 0;
  ~Room() { free(at); }
  uint8_t* of(size_t bytes) {
    if (bytes > size) {
      free(at);
      size = 0;
      const size_t page = bytes < LARGE / 8 ? 4096 : LARGE, wanted = (bytes + page - 1) / page * page;
      at = (uint8_t*)aligned_alloc(page, wanted);
      if (!at) throw std::bad_alloc();
      size = wanted;
#if defined(MADV_HUGEPAGE)
      if (page == LARGE) madvise(at, size, MADV_HUGEPAGE);
#endif
    }
    return at;
  }
};
thread_local Room shared_room, own_room;

}  // namespace
