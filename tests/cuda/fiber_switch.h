// How a fiber gives the processor to another, and what the sanitizers are told.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <vector>

#ifndef __x86_64__
#error "fibers.h changes stacks by instructions of x86-64; this processor's are missing"
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreWritesBegin(char const* file, int line);
extern "C" void AnnotateIgnoreWritesEnd(char const* file, int line);
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
// The scheduler's own memory is none of the sanitizers' business.
#define SIMT_UNSEEN __attribute__((noinline, no_sanitize("thread"), no_sanitize("address")))

// Saves the registers that a call preserves on this stack, its top in *from, and goes on with those
// on the stack `to`.
extern "C" void simt_switch(void** from, void* to);
asm(R"(
  .pushsection .text
  .weak simt_switch
  .type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .popsection
)");

namespace simt {

// While it lives, ThreadSanitizer overlooks what this thread reads and writes.
struct Unseen {
#ifdef __SANITIZE_THREAD__
  SIMT_UNSEEN Unseen() { AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
  SIMT_UNSEEN ~Unseen() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__); }
#else
  ~Unseen() {}
#endif
};

// What came before a release of `at` is seen after an acquire of it.
SIMT_UNSEEN inline void release([[maybe_unused]] void* at) {
#ifdef __SANITIZE_THREAD__
  __tsan_release(at);
#endif
}
SIMT_UNSEEN inline void acquire([[maybe_unused]] void* at) {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(at);
#endif
}

// Stacks of the threads of a block, and ThreadSanitizer's fibers for them. To make these takes as
// long as a small launch, so those of the first threads of a launch are kept for the next one.
struct Stacks {
  static constexpr size_t kBytes = 1 << 18;  // of a thread
  static constexpr unsigned kKept = 4096;    // of the 8128 that ThreadSanitizer can have
  char* memory;
  std::vector<void*> fibers;

  SIMT_UNSEEN explicit Stacks(unsigned threads)
      : memory(static_cast<char*>(mmap(nullptr, threads * kBytes, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))) {
    if (memory == MAP_FAILED) std::abort();
  }
  Stacks(Stacks const&) = delete;
  // The fiber of a thread; its stack is as much into the memory.
  SIMT_UNSEEN void* fiber([[maybe_unused]] unsigned thread) {
#ifdef __SANITIZE_THREAD__
    while (fibers.size() <= thread) fibers.push_back(__tsan_create_fiber(0));
    return fibers[thread];
#else
    return nullptr;
#endif
  }
  SIMT_UNSEEN void end(unsigned threads) {
#ifdef __SANITIZE_THREAD__
    for (void* fiber : fibers) __tsan_destroy_fiber(fiber);
#endif
    munmap(memory, threads * kBytes);
  }
};

}  // namespace simt
