// The library of test_ops.py: the kernels of the selection, the ratio loss and the merge on fibers.
// The head's, whose main loops no host has, are plain loops here over the same formulas.
//
// T tokens, C compact rows, V vocabulary.
#include <algorithm>

#include "launch.h"
#include "row_sums.h"

namespace {

float product_of(ek::Head const& a, int row, int column) {
  double sum = 0.0;
  for (int i = 0; i < a.depth; ++i)
    sum += double(ek::bf16_at(a.hidden, row * a.stride_hidden + i)) *
           ek::bf16_at(a.weight, column * a.stride_weight + i);
  return float(sum);
}

// Before the softcap.
float logit_of(ek::Head const& a, float product, int column) {
  return a.bias == nullptr ? product : product + ek::bf16_at(a.bias, column);
}

float capped(ek::Head const& a, float z) { return a.softcap > 0 ? ek::capped(z, a.softcap) : z; }

template <bool kStatistics>
void sum_row(ek::Tile const& tile, ek::Head const& a, ek::Forward const& out, int row) {
  float const scale =
      ek::kLog2e * ek::inverse_temperature(a.temperature, a.stride_temperature, row);
  for (int split = 0; split < out.splits; ++split) {
    int const start = split * tile.columns;
    int const stop = std::min(start + tile.columns, a.vocabulary);
    std::vector<float> z;
    for (int column = start; column < stop; ++column) {
      float const product = product_of(a, row, column);
      if (out.logits != nullptr)
        out.logits[int64_t(out.index[row]) * a.vocabulary + column] = product;
      z.push_back(capped(a, logit_of(a, product, column)));
      if (column == out.target[row]) out.target_logit[row] = z.back();
    }
    ek::RowSums sums;
    for (float const one : z) sums.m = ek::larger(sums.m, one);
    for (float const one : z) ek::add_column<kStatistics>(sums, one, scale);
    ek::store_sums<kStatistics>(out.partials, split, out.splits, row, a.rows, sums);
  }
}

// dz of one column of a row: the formula of dlogits_tile.h.
float gradient_of(ek::Head const& a, ek::Dlogits const& out, int row, int column) {
  auto const field = [&](int i) { return out.fields[int64_t(i) * a.rows + row]; };
  float const plain = logit_of(a, product_of(a, row, column), column);
  float const log_p =
      std::max(std::min((capped(a, plain) - field(0)) * field(1) - field(2), 0.0f), -1e4f);
  float const p = std::exp(log_p);
  float const of_target = column == out.target[row] ? -ek::expm1(log_p) : -p;
  float const slope = a.softcap > 0 ? ek::cap_slope(plain, a.softcap) : 1.0f;
  float const g_entropy = out.has_entropy ? field(4) : 0.0f;
  return slope * (p * (field(5) - g_entropy * log_p) + field(3) * of_target);
}

uint16_t rounded(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace

extern "C" {

int ek_forward_splits(ek::Tile const& tile, int vocabulary) {
  return (vocabulary + tile.columns - 1) / tile.columns;
}

void ek_forward(ek::Tile const& tile, ek::Head const& a, ek::Forward const& out, int, ek::Stream) {
  for (int row = 0; row < *out.number; ++row)
    out.statistics ? sum_row<true>(tile, a, out, row) : sum_row<false>(tile, a, out, row);
}

void ek_dlogits(ek::Tile const&, ek::Head const& a, ek::Dlogits const& out, int, ek::Stream) {
  auto* const dz = static_cast<uint16_t*>(out.dz);
  int const first = out.first == nullptr ? 0 : *out.first, stop = std::min(*out.number, a.rows);
  for (int column = out.start; column < out.stop; ++column) {
    int64_t const to = column - out.start;
    float sum = 0.0f;
    for (int row = first; row < stop; ++row) {
      float const x = gradient_of(a, out, row, column);
      sum = (row % ek::kBiasRows == 0 ? 0.0f : sum) + x;
      dz[row * out.stride_dz + to] = rounded(x);
      if (out.bias_partials != nullptr)
        out.bias_partials[row / ek::kBiasRows * out.stride_dz + to] = sum;
    }
  }
}

void ek_merge(ek::Merge const& a, ek::Stream stream) { ek::merge(a, stream); }

void ek_ratio_loss(ek::RatioLoss const& a, ek::Stream stream) { ek::ratio_loss(a, stream); }

void ek_top(ek::Values const& values, double share, ek::Top const& out, ek::Stream stream) {
  ek::top(values, share, out, stream);
}

void ek_radix_histogram(ek::Values const& values, int64_t const* prefix, int shift, int bits,
                        int prefix_bits, int64_t* counts, ek::Stream stream) {
  ek::radix_histogram(values, prefix, shift, bits, prefix_bits, counts, stream);
}

void ek_radix_pick(int64_t const* counts, int64_t const* local, int64_t const* prefix,
                   int64_t const* remaining, double share, int shift, int bits, int64_t* new_prefix,
                   int64_t* new_remaining, int64_t* equal, float* value, ek::Stream stream) {
  ek::radix_pick(counts, local, prefix, remaining, share, shift, bits, new_prefix, new_remaining,
                 equal, value, stream);
}

void ek_select_largest(ek::Values const& values, float const* threshold, int64_t const* quota,
                       int64_t* counts, uint8_t* selected, ek::Stream stream) {
  ek::select_largest(values, threshold, quota, counts, selected, stream);
}
}
