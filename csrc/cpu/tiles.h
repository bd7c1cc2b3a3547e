// Products of bf16 on tile registers. EK_TILES is the class of their instructions: TileInstructions
// or TileModel. x86-64 alone has them.
//
// The operands lie as for vdpbf16ps. 16 units x 16 lanes of a packed panel are a tile, and so are
// 16 rows x 16 units of a left operand whose units are neighbours. Two tiles of each make four of
// c, 32 x 32, which takes all eight registers. Sizes that are no multiple of 16 are copied and
// filled up with zeros; nothing is read beyond an operand.
#pragma once

#include "logit_gradients.h"
#include "tile_instructions.h"

#ifdef __x86_64__

#ifndef EK_TILES
#define EK_TILES TileModel
#endif

namespace EK_ISA {

// bf16 whose products run on tiles. They read subnormals as zero, as vdpbf16ps does.
struct Tiles {
  using Unit = std::uint32_t;
  static constexpr int kWidth = 2;
};

// The registers are the thread's. Signal handlers, which run while Interrupt asks, may use them, so
// they are configured anew after each question.
template <>
struct Ready<Tiles> {
  Ready() { EK_TILES::configure(TileConfiguration{}); }
  ~Ready() { EK_TILES::release(); }
  Ready(const Ready&) = delete;
  Ready& operator=(const Ready&) = delete;
};

constexpr int kSquare = 2 * kSide;  // rows and columns of c at once

// c[32][32] = a b over `units`. If the last ones fill no tile, `tail`, a panel of 16, holds them.
static inline void tile_square(Left<Tiles> a, const std::uint32_t* b, const std::uint32_t* tail,
                               int units, float* c, std::int64_t c_stride) {
  using T = EK_TILES;
  const std::int64_t a_bytes = a.row_stride * 4, b_bytes = kPanel * 4, c_bytes = c_stride * 4;
  T::zero<0>(), T::zero<1>(), T::zero<2>(), T::zero<3>();
  for (int k = 0; k < units; k += kSide) {
    const std::uint32_t* right = units - k < kSide ? tail : b + std::int64_t(k) * kPanel;
    T::load<4>(a.data + k, a_bytes);
    T::load<6>(right, b_bytes);
    T::load<7>(right + kSide, b_bytes);
    T::load<5>(a.data + k + kSide * a.row_stride, a_bytes);
    T::dot<0, 4, 6>();
    T::dot<1, 4, 7>();
    T::dot<2, 5, 6>();
    T::dot<3, 5, 7>();
  }
  T::store<0>(c, c_bytes);
  T::store<1>(c + kSide, c_bytes);
  T::store<2>(c + kSide * c_stride, c_bytes);
  T::store<3>(c + kSide * c_stride + kSide, c_bytes);
}

// The rows of `a` as 32 rows of whole tiles; copied into `scratch` unless they are that already.
static inline Left<Tiles> whole_tiles(Left<Tiles> a, std::int64_t rows, int units,
                                      std::uint32_t* scratch) {
  if (rows == kSquare && units % kSide == 0) return a;
  for (std::int64_t r = 0; r < kSquare; ++r) {
    const std::int64_t filled = r < rows ? units : 0;
    std::memcpy(scratch + r * kChain, a.data + r * a.row_stride, filled * 4);
    std::memset(scratch + r * kChain + filled, 0, (round_up(units, kSide) - filled) * 4);
  }
  return {scratch, kChain, 1};
}

template <>
void product<Tiles>(std::int64_t rows, Left<Tiles> a, const std::uint32_t* b, std::int64_t units,
                    float* c, std::int64_t c_stride, bool add) {
  alignas(64) std::uint32_t left[kSquare * kChain], tail[kSide * kPanel];
  alignas(64) float square[kSquare * kSquare];
  for (std::int64_t k = 0; k < units || k == 0; k += kChain) {
    const int length = int(std::min<std::int64_t>(kChain, units - k));
    const int beyond = length % kSide;
    const std::uint32_t* right = b + k * kPanel;
    if (beyond > 0) {
      std::memset(tail, 0, sizeof tail);
      std::memcpy(tail, right + (length - beyond) * kPanel, beyond * kPanel * 4);
    }
    for (std::int64_t r = 0; r < rows; r += kSquare) {
      const std::int64_t height = std::min<std::int64_t>(kSquare, rows - r);
      const Left<Tiles> part =
          whole_tiles({a.data + r * a.row_stride + k, a.row_stride, 1}, height, length, left);
      const bool sum = add || k > 0;
      for (int column = 0; column < kPanel; column += kSquare) {
        float* to = c + r * c_stride + column;
        if (!sum && height == kSquare) {
          tile_square(part, right + column, tail + column, length, to, c_stride);
          continue;
        }
        tile_square(part, right + column, tail + column, length, square, kSquare);
        for (std::int64_t i = 0; i < height; ++i)
          for (int j = 0; j < kSquare; j += kLanes) {
            const Vec computed = load(square + i * kSquare + j);
            float* p = to + i * c_stride + j;
            store(p, sum ? load(p) + computed : computed);
          }
      }
    }
  }
}

// dz of one block of the weight's rows. Units are neighbours in both layouts: [V][R] along the
// active rows for dW, [R][V] along the weight's rows for dH.
template <>
struct Block<Tiles> {
  std::int64_t stride;  // in units, and no power of two
  std::vector<std::uint32_t> along_active, along_vocabulary;

  explicit Block(std::int64_t rows)
      : stride(rows / 2 + 16), along_active(rows * kRowStride / 2),
        along_vocabulary(kRowChunk * stride) {}

  // Stores a tile as the general Block does.
  void put(const float* tile, std::int64_t first, std::int64_t rows, std::int64_t column) {
    std::uint32_t pairs[kTileRows / 2][kPanel];
    auto* active = reinterpret_cast<std::uint16_t*>(along_active.data());
    for (std::int64_t r = 0; r < rows; r += 2) {
      std::uint16_t low[kPanel], high[kPanel] = {};
      for (int i = 0; i < kPanel; ++i) low[i] = to_bf16(tile[r * kPanel + i]);
      std::memcpy(active + (first + r) * kRowStride + column, low, sizeof low);
      if (r + 1 < rows) {
        for (int i = 0; i < kPanel; ++i) high[i] = to_bf16(tile[(r + 1) * kPanel + i]);
        std::memcpy(active + (first + r + 1) * kRowStride + column, high, sizeof high);
      }
      for (int i = 0; i < kPanel; ++i) pairs[r / 2][i] = low[i] | std::uint32_t{high[i]} << 16;
    }
    for (int i = 0; i < kPanel; ++i)
      for (std::int64_t k = 0; k < (rows + 1) / 2; ++k)
        along_vocabulary[(column + i) * stride + first / 2 + k] = pairs[k][i];
  }

  Left<Tiles> for_weight() const { return {along_active.data(), kRowStride / 2, 1}; }
  Left<Tiles> for_hidden() const { return {along_vocabulary.data(), stride, 1}; }
};

}  // namespace EK_ISA

#endif
