// Threads: how work is divided among them, and how it is stopped.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <atomic>
#include <chrono>

#include "head.h"
#include "isa.h"

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

// The calling thread asks `stop` every 200 ms; the other threads see its answer.
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

// Part `i` of `parts` of [0, n). It is contiguous and the same at every call, so sums over it have
// the same bits at the same number of threads.
struct Part {
  std::int64_t begin, end;
  Part(std::int64_t n, std::int64_t parts, std::int64_t i)
      : begin(n * i / parts), end(n * (i + 1) / parts) {}
};

}  // namespace EK_ISA
