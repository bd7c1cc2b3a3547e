// What both directions share: how work is divided, and stopping it.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <atomic>
#include <chrono>

#include "head.h"

namespace EK_ISA {

static inline int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

static inline int usable_threads(int wanted) {
#ifdef _OPENMP
  return wanted;
#else
  (void)wanted;
  return 1;
#endif
}

// The calling thread asks `stop` now and then; the others see its answer.
class Interrupt {
 public:
  explicit Interrupt(entropy_kernels::Stop stop) : stop_(stop) {}

  bool operator()() {
    if (thread_number() == 0 && !stopped_.load(std::memory_order_relaxed)) {
      const auto now = std::chrono::steady_clock::now();
      if (now - last_ > std::chrono::milliseconds(200)) {
        last_ = now;
        if (stop_()) stopped_.store(true, std::memory_order_relaxed);
      }
    }
    return stopped_.load(std::memory_order_relaxed);
  }

 private:
  entropy_kernels::Stop stop_;
  std::atomic<bool> stopped_{false};
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

// What a thread sets up before products of E, and puts away after them: nothing but in tiles.h.
template <class E>
struct Ready {};

// Part `i` of `parts` of [0, n): contiguous, and the same at every call, so that sums over a part
// are the same bits for a number of threads.
struct Part {
  std::int64_t begin, end;
  Part(std::int64_t n, std::int64_t parts, std::int64_t i)
      : begin(n * i / parts), end(n * (i + 1) / parts) {}
};

}  // namespace EK_ISA
