// Intel's AMX: the instructions that products of bf16 on tiles need, and a model of them.
//
// Each class has eight tile registers, 16 rows of 64 bytes each, and one static function per
// instruction: configure (ldtilecfg), release (tilerelease), zero, load, store and dot (tdpbf16ps).
// Template arguments number the registers.
#pragma once

#include "bits.h"
#include "isa.h"

#ifdef __x86_64__
#include <xmmintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace EK_ISA {

constexpr int kTiles = 8, kTileBytes = 64;
constexpr int kSide = 16;  // rows of a tile, and units of 4 bytes per row

// The operand of ldtilecfg.
struct alignas(64) TileConfiguration {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfiguration) == 64, "ldtilecfg reads 64 bytes");

// Inline assembly, since GCC's intrinsics take only literals as register numbers and do not say
// that memory is read.
struct TileInstructions {
  static void configure(const TileConfiguration& c) { asm volatile("ldtilecfg %0" ::"m"(c)); }
  static void release() { asm volatile("tilerelease"); }
  template <int T>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  template <int T>
  static void load(const void* from, std::int64_t stride) {  // bytes from row to row
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  static void store(void* to, std::int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
  }
  // c[m][n] += sum_k a[m][k] . b[k][n] over pairs of bf16
  template <int C, int A, int B>
  static void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};

// The same in plain C++, after the operations in Intel's Software Developer's Manual, volume 2. It
// ends the process where the processor raises an exception.
class TileModel {
 public:
  static void configure(const TileConfiguration& c) {
    check(c.palette <= 1 && c.start_row == 0, "palette or start row");
    for (const std::uint8_t x : c.reserved) check(x == 0, "reserved bytes");
    for (int t = 0; t < 16; ++t) {
      const bool named = t < kTiles && c.palette == 1;
      check(named ? c.row_bytes[t] <= kTileBytes && c.rows[t] <= kSide &&
                        (c.row_bytes[t] == 0) == (c.rows[t] == 0)
                  : c.row_bytes[t] == 0 && c.rows[t] == 0,
            "rows or bytes of a row");
    }
    state() = State{};
    state().configuration = c;
  }

  static void release() {
    state() = State{};
    state().configuration.palette = 0;
  }

  template <int T>
  static void zero() {
    usable(T);
    std::memset(state().tiles[T], 0, sizeof state().tiles[T]);
  }

  template <int T>
  static void load(const void* from, std::int64_t stride) {
    zero<T>();
    for (int row = 0; row < rows(T); ++row)
      std::memcpy(state().tiles[T][row], static_cast<const char*>(from) + row * stride, bytes(T));
  }

  template <int T>
  static void store(void* to, std::int64_t stride) {
    usable(T);
    for (int row = 0; row < rows(T); ++row)
      std::memcpy(static_cast<char*>(to) + row * stride, state().tiles[T][row], bytes(T));
  }

  template <int C, int A, int B>
  static void dot() {
    usable(C), usable(A), usable(B);
    check(C != A && C != B && A != B, "one register twice");
    check(bytes(A) % 4 == 0 && bytes(B) % 4 == 0, "half a pair");
    check(rows(C) == rows(A) && bytes(C) == bytes(B) && bytes(A) == 4 * rows(B), "shapes of a dot");
    // Whatever the thread's mode, subnormal operands and results are zero and rounding is to even.
    const unsigned mode = _mm_getcsr();
    _mm_setcsr(0x9fc0);
    for (int row = 0; row < rows(C); ++row) dot_row(row, C, A, B);
    _mm_setcsr(mode);
  }

 private:
  struct State {
    TileConfiguration configuration;
    unsigned char tiles[kTiles][kSide][kTileBytes] = {};
  };

  static State& state() {
    static thread_local State of_thread = [] {
      State unconfigured;
      unconfigured.configuration.palette = 0;
      return unconfigured;
    }();
    return of_thread;
  }

  static void check(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "the model of tile instructions was given wrong %s\n", what);
    std::abort();
  }

  static void usable(int t) {
    check(state().configuration.palette == 1 && rows(t) > 0, "registers, not configured");
  }

  static int rows(int t) { return state().configuration.rows[t]; }
  static int bytes(int t) { return state().configuration.row_bytes[t]; }

  // Not inlined, so that no arithmetic moves out of the mode that dot sets. Even and odd values of
  // the pairs are summed apart.
  __attribute__((noinline)) static void dot_row(int row, int c, int a, int b) {
    float even[kSide] = {}, odd[kSide] = {}, sum[kSide];
    for (int k = 0; k < bytes(a) / 4; ++k) {
      float left[2], right[2][kSide];
      unpack(state().tiles[a][row] + 4 * k, 1, left, left + 1);
      unpack(state().tiles[b][k], kSide, right[0], right[1]);
      for (int n = 0; n < kSide; ++n) {
        even[n] = std::fma(left[0], right[0][n], even[n]);
        odd[n] = std::fma(left[1], right[1][n], odd[n]);
      }
    }
    std::memcpy(sum, state().tiles[c][row], sizeof sum);
    for (int n = 0; n < bytes(c) / 4; ++n) sum[n] += even[n] + odd[n];
    std::memcpy(state().tiles[c][row], sum, sizeof sum);
  }

  static void unpack(const unsigned char* pairs, int count, float* even, float* odd) {
    for (int n = 0; n < count; ++n) {
      const auto pair = read_as<std::uint32_t>(pairs + 4 * n);
      even[n] = bits_as<float>(pair << 16);
      odd[n] = bits_as<float>(pair & 0xffff0000u);
    }
  }
};

}  // namespace EK_ISA

#endif
