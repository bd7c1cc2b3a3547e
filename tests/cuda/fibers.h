// Fibers that stand for the CUDA threads of a launch: who runs when, where threads meet, and what
// the sanitizers are told. simt.h has the words of CUDA on top of it.
//
// Blocks run one after another, in an order of the seed, so that a kernel may not wait for another
// block. A thread runs until it waits for others; with `preempt` it may also stop at any atomic or
// warp instruction. With a seed the order of threads is random, and some warps and threads run only
// where nothing else can. ThreadSanitizer takes a fiber for a thread that only barriers order, also
// among blocks: a barrier left out is a data race in any schedule. Shuffles order nothing.
#pragma once
#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "fiber_switch.h"

#ifndef SIMT_CUDA_HEADERS
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
#endif

namespace simt {

constexpr unsigned kWarp = 32;

inline unsigned seed = 0;
inline bool preempt = false;

// Where threads wait for each other: a barrier of the block, or an instruction of a warp's lanes.
struct Meeting {
  char const* where = nullptr;  // file, line and instruction
  unsigned mask = 0, arrived = 0, generation = 0;
  uint64_t value[kWarp];
  char order[2];  // what ThreadSanitizer hangs the order on, by turns
};

struct Thread {
  void* top = nullptr;  // of its stack, while it does not run
  char* stack = nullptr;
  void* sanitizer = nullptr;  // ThreadSanitizer's fiber, or AddressSanitizer's stack
  dim3 index;
  unsigned rank = 0;
  bool done = false, late = false;
  Meeting* meeting = nullptr;  // where it waits for the others
  unsigned generation = 0;
  uint64_t met[kWarp];     // what the lanes brought to the last meeting
  bool fenced = false;     // passed a __threadfence
  void* atomic = nullptr;  // its last atomic's address, if no __threadfence came since
};

struct Block {
  void* top = nullptr;  // the scheduler's
  void* sanitizer = nullptr;
  void const* stack = nullptr;
  size_t stack_size = 0;
  dim3 grid, size, index;
  unsigned number = 0, threads = 0, left = 0;
  Thread* thread = nullptr;
  Meeting* lanes = nullptr;  // kWarp of each warp: one per mask in use
  Meeting barrier;
  std::map<void const*, unsigned char*> shared;  // by the place that declares it
  unsigned char* dynamic = nullptr;
  void (*run)(void*);
  void* body;
};

inline Block* block = nullptr;
inline Thread* now = nullptr;
inline uint64_t drawn = 1;
inline char launch_start = 0, launch_end = 0;
// Shared memory of all blocks of the launch: memory used again would look like a race.
inline std::vector<std::unique_ptr<unsigned char[]>> memory;

SIMT_UNSEEN inline unsigned draw() {  // xorshift
  drawn ^= drawn << 13, drawn ^= drawn >> 7, drawn ^= drawn << 17;
  return static_cast<unsigned>(drawn >> 32);
}
SIMT_UNSEEN inline void shuffle(std::vector<unsigned>& numbers) {
  for (size_t i = numbers.size(); i > 1; --i) std::swap(numbers[i - 1], numbers[draw() % i]);
}

[[noreturn]] __attribute__((format(printf, 1, 2))) SIMT_UNSEEN inline void fail(char const* text,
                                                                                ...) {
  std::fprintf(stderr, "simt: ");
  if (block) std::fprintf(stderr, "block %u: ", block->number);
  if (now) std::fprintf(stderr, "thread %u: ", now->rank);
  va_list arguments;
  va_start(arguments, text);
  std::vfprintf(stderr, text, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  std::abort();
}

SIMT_UNSEEN inline void to_scheduler() {
  Thread* const me = now;
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(block->sanitizer, 1);  // 1: it orders nothing
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(me->done ? nullptr : &me->sanitizer, block->stack,
                                 block->stack_size);
#endif
  simt_switch(&me->top, block->top);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(me->sanitizer, nullptr, nullptr);
#endif
}

SIMT_UNSEEN inline void to_thread(Thread& thread) {
  now = &thread;
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(thread.sanitizer, 1);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&block->sanitizer, thread.stack, Stacks::kBytes);
#endif
  simt_switch(&block->top, thread.top);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(block->sanitizer, nullptr, nullptr);
#endif
  now = nullptr;
}

SIMT_UNSEEN inline void thread_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &block->stack, &block->stack_size);
#endif
  acquire(&launch_start);
  block->run(block->body);
  now->done = true;
  --block->left;
  release(&launch_end);
  to_scheduler();
}

SIMT_UNSEEN inline void pause() {
  if (preempt && draw() % 2) to_scheduler();
}

// Waits until `expected` threads are here, of one instruction and one mask, and takes what each
// lane brought. `ordered`: what a thread did before is seen by all of them after.
SIMT_UNSEEN inline void meet(Meeting& m, char const* where, unsigned mask, unsigned expected,
                             uint64_t value, bool ordered) {
  Thread& me = *now;
  if (m.arrived && (m.mask != mask || std::strcmp(m.where, where)))
    fail("is at %s (mask %08x) where others wait at %s (mask %08x)", where, mask, m.where, m.mask);
  m.where = where;
  m.mask = mask;
  m.value[me.rank % kWarp] = value;
  unsigned const generation = m.generation;
  // By turns, or a thread that is slow to leave would also take what the fast have done since.
  char* const order = &m.order[generation % 2];
  if (ordered) release(order);
  if (++m.arrived < expected) {
    me.meeting = &m;
    me.generation = generation;
    to_scheduler();
  } else {
    Thread* const warp = &me - me.rank % kWarp;
    for (unsigned lane = 0; lane < kWarp; ++lane)
      for (unsigned i = 0; i < kWarp && (mask >> lane & 1); ++i) warp[lane].met[i] = m.value[i];
    m.arrived = 0;
    ++m.generation;
    pause();
  }
  if (ordered) acquire(order);
}

SIMT_UNSEEN inline void meet_block(char const* where) {
  meet(block->barrier, where, 0, block->threads, 0, true);
}

// Where lanes of this mask met last, or a place that no mask needs any more.
SIMT_UNSEEN inline Meeting& meeting_of(Meeting* warp, unsigned mask) {
  for (unsigned i = 0; i < kWarp; ++i)
    if (warp[i].mask == mask || warp[i].mask == 0) return warp[i];
  for (unsigned i = 0;; ++i)  // there are fewer open ones than lanes, each of which waits at one
    if (warp[i].arrived == 0) return warp[i];
}

// The same for the lanes of a mask; now->met of the others is all ones.
SIMT_UNSEEN inline void meet_lanes(char const* where, unsigned mask, uint64_t value, bool ordered) {
  unsigned const lane = now->rank % kWarp;
  if (!(mask >> lane & 1)) fail("%s: lane %u is not in its own mask %08x", where, lane, mask);
  Meeting& m = meeting_of(&block->lanes[now->rank - lane], mask);
  // A loop, for ThreadSanitizer watches memset.
  for (unsigned i = 0; i < kWarp && !m.arrived; ++i) m.value[i] = ~uint64_t{0};
  meet(m, where, mask, unsigned(__builtin_popcount(mask)), value, ordered);
}

// Memory that holds no useful number.
SIMT_UNSEEN inline unsigned char* new_shared(size_t size) {
  Unseen const unseen;
  memory.emplace_back(new unsigned char[size]);
  std::memset(memory.back().get(), seed % 2 ? 0x7f : 0xff, size);
  return memory.back().get();
}
SIMT_UNSEEN inline void* shared(void const* place, size_t size) {
  Unseen const unseen;
  unsigned char*& bytes = block->shared[place];
  if (bytes == nullptr) bytes = new_shared(size);
  return bytes;
}

// One round of the threads that can run, in a random order with a seed; whether any could.
SIMT_UNSEEN inline bool round(std::vector<unsigned>& turn, bool late) {
  bool moved = false;
  if (seed) shuffle(turn);
  for (unsigned i : turn) {
    Thread& thread = block->thread[i];
    if (thread.done || (thread.late && !late)) continue;
    if (thread.meeting && thread.meeting->generation == thread.generation) continue;
    thread.meeting = nullptr;
    moved = true;
    to_thread(thread);
  }
  return moved;
}

[[noreturn]] SIMT_UNSEEN inline void fail_waiting() {
  std::map<std::string, unsigned> places;
  for (unsigned i = 0; i < block->threads; ++i) {
    Thread const& t = block->thread[i];
    ++places[t.done ? "the end" : t.meeting->where];
  }
  std::string text;
  for (auto const& [place, threads] : places)
    text += (text.empty() ? "" : ", ") + std::to_string(threads) + " at " + place;
  fail("threads wait for others that never come: %s", text.c_str());
}

// With the stacks from number `first` on.
SIMT_UNSEEN inline void run_block(Block& b, Stacks& stacks, unsigned first) {
  block = &b;
  std::vector<unsigned> turn(b.threads);
  for (unsigned i = 0; i < b.threads; ++i) {
    turn[i] = i;
    Thread& t = b.thread[i];
    t.rank = i;
    t.index = dim3(i % b.size.x, i / b.size.x % b.size.y, i / b.size.x / b.size.y);
    // Seven words for simt_switch: six registers and where to return; above them the stack is as a
    // call leaves it.
    t.stack = stacks.memory + (first + i) * Stacks::kBytes;
    auto** const top = reinterpret_cast<void**>(t.stack + Stacks::kBytes) - 8;
    top[7] = nullptr;
    top[6] = reinterpret_cast<void*>(&thread_main);
    t.top = top;
    t.sanitizer = stacks.fiber(first + i);
  }
  for (unsigned w = 0; seed && w < b.threads; w += kWarp) {
    unsigned const kind = draw() % 4;
    for (unsigned lane = 0; lane < kWarp; ++lane)
      b.thread[w + lane].late = kind == 0 || (kind == 1 && draw() % 4 == 0);
  }
#ifdef __SANITIZE_THREAD__
  b.sanitizer = __tsan_get_current_fiber();
#endif
  while (b.left)
    if (!round(turn, false) && !round(turn, true)) fail_waiting();
  block = nullptr;
}

// Runs `body` once per thread of every block.
template <class Body>
SIMT_UNSEEN void launch(dim3 grid, dim3 size, size_t dynamic, Body body) {
  unsigned const threads = size.x * size.y * size.z, blocks = grid.x * grid.y * grid.z;
  if (!blocks || !threads || threads > 1024 || grid.y > 65535 || grid.z > 65535 || size.z > 64)
    fail("no GPU launches %u x %u x %u blocks of %u x %u x %u threads", grid.x, grid.y, grid.z,
         size.x, size.y, size.z);
  if (threads % kWarp) fail("blocks of %u threads are not whole warps", threads);
  drawn = 0x9e3779b97f4a7c15u * (seed + 1);
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = i;
  if (seed) shuffle(order);
  release(&launch_start);
  static Stacks kept(Stacks::kKept);
  unsigned launched = 0;
  for (unsigned const number : order) {
    // Not on the stack: ThreadSanitizer would take its barriers for those of the block before.
    auto const owner = std::make_unique<Block>();
    Block& b = *owner;
    b.grid = grid, b.size = size, b.number = number, b.threads = b.left = threads;
    b.index = dim3(number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y);
    auto const thread = std::make_unique<Thread[]>(threads);
    auto const lanes = std::make_unique<Meeting[]>(threads);
    b.thread = thread.get(), b.lanes = lanes.get();
    b.dynamic = new_shared(dynamic);
    b.run = [](void* f) { (*static_cast<Body*>(f))(); };
    b.body = &body;
    if (launched + threads <= Stacks::kKept) {
      run_block(b, kept, launched);
    } else {
      Stacks stacks(threads);
      run_block(b, stacks, 0);
      stacks.end(threads);
    }
#ifdef __SANITIZE_THREAD__
    launched += threads;  // what a fiber does next would be ordered after what it did before
#endif
  }
  acquire(&launch_end);
  memory.clear();
}

}  // namespace simt
