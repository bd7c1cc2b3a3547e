// The whole kernel of sm_80 on fibers, CUTLASS's main loop in it: its tails, its zeros, its shared
// memory. The three instructions of hardware are done here as PTX's manual has them.
// CUTLASS's headers come first, and want what CUDA declares without nvcc's help.
#include <device_launch_parameters.h>
int atomicCAS(int*, int, int);
void __syncthreads();
void __syncwarp(unsigned = 0);
#include <cutlass/gemm/collective/collective_mma_decl.hpp>
// After it.
#include <cutlass/gemm/collective/sm80_mma_multistage.hpp>

#include "logits.h"
#include "refusals.h"

void(__syncthreads)() { simt::meet_block("the main loop's barrier"); }

cudaError_t cudaFuncSetAttribute(void const*, cudaFuncAttribute, int) { return cudaSuccess; }

namespace cute {

// What the lanes of a warp bring to an instruction: all bring it before one reads it.
template <class T>
struct Brought {
  T of[8][32];
  T& mine() { return of[threadIdx.x / 32][threadIdx.x % 32]; }
  T const& from(int lane) const { return of[threadIdx.x / 32][lane]; }
};

template <>
struct SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint128_t, uint128_t> {
  using SRegisters = uint128_t[1];
  using DRegisters = uint128_t[1];
  static void copy(uint128_t const& from, uint128_t& to, bool there) {
    expect(reinterpret_cast<uintptr_t>(&to) % 16 == 0, "a copy of 16 bytes is aligned");
    to = there ? from : uint128_t{};
  }
};

struct HostLdsm {
  using SRegisters = uint128_t[1];
  using DRegisters = uint32_t[4];
  static void copy(uint128_t const& row, uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
    static Brought<uint128_t const*> rows;
    rows.mine() = &row;
    __syncwarp();
    int const lane = threadIdx.x % 32;
    uint32_t* const to[] = {&a, &b, &c, &d};
    for (int i = 0; i < 4; ++i)  // two numbers of row lane / 4 of the i-th matrix
      memcpy(to[i], reinterpret_cast<char const*>(rows.from(8 * i + lane / 4)) + lane % 4 * 4, 4);
    __syncwarp();
  }
};
template <>
struct Copy_Traits<HostLdsm> : Copy_Traits<SM75_U32x4_LDSM_N> {};

struct HostMma : SM80_16x8x16_F32BF16BF16F32_TN {
  using Words = array<uint32_t, 6>;
  // The k-th number of row g: of A where `first` is 0 or 1 for rows + 8, of B where it is 4.
  static float number(Brought<Words> const& words, int first, int g, int k) {
    int const word = first == 4 ? 4 + k / 8 : first + k / 8 * 2;
    return ek::bf16_at(&words.from(g * 4 + k % 8 / 2)[word], k % 2);
  }
  static void fma(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2,
                  uint32_t a3, uint32_t b0, uint32_t b1, float c0, float c1, float c2, float c3) {
    static Brought<Words> words;
    words.mine() = {a0, a1, a2, a3, b0, b1};
    __syncwarp();
    float* const to[] = {&d0, &d1, &d2, &d3};
    float const from[] = {c0, c1, c2, c3};
    int const lane = threadIdx.x % 32;
    for (int i = 0; i < 4; ++i) {
      float sum = from[i];
      for (int k = 0; k < 16; ++k)
        sum += number(words, i / 2, lane / 4, k) * number(words, 4, lane % 4 * 2 + i % 2, k);
      *to[i] = sum;
    }
    __syncwarp();
  }
};
template <>
struct MMA_Traits<HostMma> : MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN> {};

}  // namespace cute

#define SM75_U32x4_LDSM_N HostLdsm
#define SM80_16x8x16_F32BF16BF16F32_TN HostMma
#include "fragment.h"
#include "product_sm80.h"

namespace {

constexpr uint16_t kNan = 0x7fc0;

// An Operation that keeps the products; of rows and columns that are not there it wants zeros.
struct Keep {
  float* product;  // [rows, columns]
  int columns;

  template <class Tile, class Mma>
  static constexpr int shared_bytes() {
    return 0;
  }
  template <class Tile, class Accumulators, class Mma>
  void operator()(Tile tile, int block, int split, int end, Accumulators& accumulators, Mma mma,
                  int thread, void*) const {
    auto const z = ek::rows_and_columns(accumulators);
    auto const c = ek::coordinates(tile, mma, thread);
    for (int i = 0; i < cute::size<0>(z); ++i)
      for (int j = 0; j < cute::size<1>(z); ++j) {
        int const t = block * 128 + cute::get<0>(c(i, j)), v = split * 128 + cute::get<1>(c(i, j));
        if (t < end && v < columns)
          product[size_t(t) * columns + v] += z(i, j);
        else
          expect(z(i, j) == 0, "zeros beyond the end");
      }
  }
};

// Whole numbers, whose sums are exact; NaN around them, a tile long after the last.
struct Matrix {
  int stride;
  std::vector<uint4> bytes;
  Matrix(int rows, int first, int end, int depth)
      : stride((depth + 23) / 8 * 8), bytes((rows + 128) * stride / 8, uint4{}) {
    for (int row = 0; row < rows + 128; ++row)
      for (int k = 0; k < stride; ++k) {
        bool const there = first <= row && row < end && k < depth;
        at(row, k) = there ? cute::bfloat16_t(float((row * 7 + k * 5) % 9 - 4)).storage : kNan;
      }
  }
  uint16_t& at(int row, int k) {
    return reinterpret_cast<uint16_t*>(bytes.data())[size_t(row) * stride + k];
  }
};

void check(int rows, int first, int number, int depth, int start, int columns) {
  int const end = std::min(number, rows), vocabulary = start + columns + 3;
  Matrix hidden(rows, first, end, depth), weight(vocabulary, start, start + columns, depth);
  ek::Head head{};
  head.hidden = hidden.bytes.data(), head.stride_hidden = hidden.stride;
  head.weight = weight.bytes.data(), head.stride_weight = weight.stride;
  head.rows = rows, head.depth = depth, head.vocabulary = vocabulary;
  std::vector<float> product(size_t(rows) * columns, 0.5f);
  ek::product_sm80("product", head, start, columns, {&first, &number, rows},
                   Keep{product.data(), columns}, nullptr);
  for (int t = 0; t < rows; ++t)
    for (int v = 0; v < columns; ++v) {
      float wanted = 0.5f;
      for (int k = 0; k < depth && first <= t && t < end; ++k)
        wanted += ek::bf16_at(&hidden.at(t, k), 0) * ek::bf16_at(&weight.at(start + v, k), 0);
      float const got = product[size_t(t) * columns + v];
      expect(got == wanted, std::to_string(depth) + " deep, [" + std::to_string(t) + ", " +
                                std::to_string(v) + "] is " + std::to_string(got) + "; wanted " +
                                std::to_string(wanted));
    }
}

}  // namespace

int main() {
  for (int const depth : {8, 56, 64, 72, 128, 136, 256, 328}) check(5, 0, 3, depth, 8, 11);
  check(300, 0, 290, 72, 0, 130);
  check(300, 256, 400, 200, 24, 264);
  check(130, 0, 0, 64, 0, 40);
  return !right;
}
