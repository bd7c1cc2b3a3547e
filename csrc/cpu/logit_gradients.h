// Gradients with respect to the logits of a tile, and the block of them that the products read.
//
//   dz_j = [g_logprob (1[j = target] - p_j) + g_logsumexp p_j - g_entropy p_j (log p_j + H)] / temp
//
// dz is held in the dtype of the inputs where the products take it (bf16), else in fp32.
#pragma once

#include "active_rows.h"

namespace EK_ISA {

// Turns logits into dz. At the target, g_logprob (1 - p) comes from expm1, which keeps its digits.
static void differentiate_tile(const ActivePanel& panel, std::int64_t first_row, std::int64_t rows,
                               bool with_entropy, float* tile) {
  const Vec zero{}, low = splat(kLowestExponent);
  float at_target[kPanel];
  for (int i = 0; i < kPanel; ++i) {
    const std::int64_t r = panel.target[i] - first_row;
    if (r < 0 || r >= rows) continue;
    const float d = (tile[r * kPanel + i] - panel.max[i]) / panel.temperature[i] - panel.log_sum[i];
    const float logp = d < kLowestExponent ? kLowestExponent : (d > 0 ? 0 : d);
    at_target[i] = std::exp(logp) * (panel.rest[i] - panel.entropy[i] * logp) -
                   panel.logprob[i] * std::expm1(logp);
  }
  for (int j = 0; j < kPanel; j += kLanes) {
    const Vec max = load(panel.max + j), temperature = load(panel.temperature + j);
    const Vec log_sum = load(panel.log_sum + j), entropy = load(panel.entropy + j);
    const Vec factor = load(panel.rest + j) - load(panel.logprob + j);
    for (std::int64_t r = 0; r < rows; ++r) {
      float* z = tile + r * kPanel + j;
      Vec logp = (load(z) - max) / temperature - log_sum;
      logp = larger(low, -larger(zero, -logp));
      Vec p = exp_nonpositive(logp);
      p = logp == low ? zero : p;  // a logit of -inf has p = 0 exactly
      store(z, p * (with_entropy ? factor - entropy * logp : factor));
    }
  }
  for (int i = 0; i < kPanel; ++i) {
    const std::int64_t r = panel.target[i] - first_row;
    if (r >= 0 && r < rows) tile[r * kPanel + i] = at_target[i];
  }
}

// Turns logits into capped ones; slope is their derivative, 1 - tanh^2.
static void cap_with_slope(float softcap, std::int64_t rows, float* tile, float* slope) {
  for (std::int64_t i = 0; i < rows * kPanel; ++i) {
    const float u = std::tanh(tile[i] / softcap);
    slope[i] = 1 - u * u;
    tile[i] = softcap * u;
  }
}

// dz of one block of the weight's rows, in the two layouts that the products read: along the active
// rows for dW, along the weight's rows for dH. For fp32 they are one.
template <class E>
struct Block {
  using Unit = typename E::Unit;
  std::vector<Unit> along_active, along_vocabulary;

  explicit Block(std::int64_t rows) : along_active(rows * kRowStride / E::kWidth) {
    if (E::kWidth == 2) along_vocabulary.resize(rows / 2 * kRowStride);
  }

  // Stores a tile: rows [first, first + rows) of the block, active rows [column, column + 64). Zero
  // follows an odd last row.
  void put(const float* tile, std::int64_t first, std::int64_t rows, std::int64_t column) {
    if constexpr (E::kWidth == 1) {
      for (std::int64_t r = 0; r < rows; ++r)
        std::memcpy(along_active.data() + (first + r) * kRowStride + column, tile + r * kPanel,
                    kPanel * 4);
    } else {
#ifdef EK_BF16
      for (std::int64_t r = 0; r < rows; r += 2) {
        for (int j = 0; j < kPanel; j += kLanes) {
          const Vec low = load(tile + r * kPanel + j);
          const Vec high = r + 1 < rows ? load(tile + (r + 1) * kPanel + j) : Vec{};
          const HalfVec a = to_bf16(low), b = to_bf16(high);
          auto* active = reinterpret_cast<std::uint16_t*>(along_active.data());
          active += (first + r) * kRowStride + column + j;
          std::memcpy(active, &a, sizeof a);
          if (r + 1 < rows) std::memcpy(active + kRowStride, &b, sizeof b);
          const Pairs pairs = pair_up(a, b);
          std::memcpy(along_vocabulary.data() + (first + r) / 2 * kRowStride + column + j, &pairs,
                      sizeof pairs);
        }
      }
#endif
    }
  }

  Left<E> for_weight() const { return {along_active.data(), kRowStride / E::kWidth, 1}; }
  Left<E> for_hidden() const {
    return {E::kWidth == 1 ? along_active.data() : along_vocabulary.data(), 1, kRowStride};
  }
};

}  // namespace EK_ISA
