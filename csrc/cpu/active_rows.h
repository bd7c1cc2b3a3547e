// The rows that carry gradient, gathered once and packed for each product of backward.
#pragma once

#include "running_sums.h"

namespace EK_ISA {

using entropy_kernels::BackwardCall;

constexpr std::int64_t kRowChunk = 512;              // active rows whose dz is held at once
constexpr std::int64_t kRowStride = kRowChunk + 16;  // a power of two would map to few cache sets

// What backward needs of a panel of 64 active rows, zero beyond the last row. Gradients are divided
// by the temperature.
struct ActivePanel {
  float max[kPanel], log_sum[kPanel], temperature[kPanel];
  float logprob[kPanel], entropy[kPanel], rest[kPanel];  // rest = g_logsumexp - g_entropy H
  std::int64_t target[kPanel], token[kPanel];

  ActivePanel(const BackwardCall& call, std::int64_t first) {
    const auto& [head, rows, saved, in, out] = call;
    for (int i = 0; i < kPanel; ++i) {
      const bool real = first + i < rows.count;
      const std::int64_t t = real ? rows[first + i] : 0;
      const auto grad = [&](const float* g) { return real && g != nullptr ? g[first + i] : 0.0f; };
      temperature[i] = real && head.temperature != nullptr ? head.temperature[t] : 1.0f;
      max[i] = real ? saved.max[t] : 0.0f;
      log_sum[i] = real ? saved.log_sum[t] : 0.0f;
      logprob[i] = grad(in.logprob) / temperature[i];
      entropy[i] = grad(in.entropy) / temperature[i];
      const float h = real ? saved.entropy[t] : 0.0f;
      rest[i] = grad(in.logsumexp) / temperature[i] - (entropy[i] == 0 ? 0 : entropy[i] * h);
      target[i] = real ? head.target[t] : -1;
      token[i] = t;
    }
  }
};

// The active rows, packed for both of their products.
template <class E>
struct Gathered {
  std::int64_t units, panels, row_chunks;
  std::vector<typename E::Unit> along_dim;   // panels of rows, for the logits
  std::vector<typename E::Unit> along_rows;  // for each chunk of rows, panels of D, for dW
  std::vector<ActivePanel> active;

  explicit Gathered(const BackwardCall& call) {
    const Head& head = call.head;
    const Rows& rows = call.rows;
    const bool for_weight = call.out.weight != nullptr;
    units = units_of<E>(head.dim);
    panels = ceil_div(rows.count, kPanel);
    row_chunks = ceil_div(rows.count, kRowChunk);
    const std::int64_t wide = round_up(head.dim, kPanel);
    along_dim.resize(panels * kPanel * units);
    if (for_weight) along_rows.resize(row_chunks * (kRowChunk / E::kWidth) * wide);
    std::vector<typename E::Unit> buffer(kRowChunk * units);
    const typename E::Unit* lanes[kPanel];
    for (std::int64_t c = 0; c < row_chunks; ++c) {
      const std::int64_t first = c * kRowChunk, count = std::min(kRowChunk, rows.count - first);
      for (std::int64_t i = 0; i < count; ++i)
        read_row<E>(head.hidden, rows[first + i] * head.hidden_stride, head.dim, head.dtype,
                    buffer.data() + i * units);
      for (std::int64_t p = 0; p < count; p += kPanel) {
        const std::int64_t here = std::min<std::int64_t>(kPanel, count - p);
        for (std::int64_t i = 0; i < here; ++i) lanes[i] = buffer.data() + (p + i) * units;
        pack_rows<E>(lanes, here, units, along_dim.data() + (first + p) * units);
        active.emplace_back(call, first + p);
      }
      if (for_weight)
        pack_columns<E>(buffer.data(), units, count, head.dim,
                        along_rows.data() + c * (kRowChunk / E::kWidth) * wide);
    }
  }
};

}  // namespace EK_ISA
