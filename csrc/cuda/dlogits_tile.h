// The epilogue of a tile of logits for one thread: dz of its rows and columns, from the
// accumulators where they are. dz is computed in fp32 and rounded once to bf16, sixteen bytes to a
// store. The gradient of the bias is summed before that rounding, over the rows of a warp.
//
// With rest = g_logsumexp - g_entropy H, and all gradients over the temperature,
//
//     dz = slope (p (rest - g_entropy log p) + g_logprob ([target] - p)),
//
// where `slope` is that of the softcap. At the target, 1 - p is -expm1(log p), which has all its
// digits when p is near 1.
//
// C compact rows, N columns of a chunk of the vocabulary.
#pragma once
#include "fragment.h"
#include "launch.h"
#include "logits.h"

namespace ek {

// The least log p: exp of less is 0, and a finite log p times 0 is 0, whatever the logit.
constexpr float kLeastLogprob = -1e4f;
// What a thread has of 32 columns, and stores at once after an exchange within its quad.
constexpr int kStored = 8;

// x in [low, 0]. A NaN stays.
EK_HD float clamped(float x, float low) {
#ifdef __CUDA_ARCH__
  asm("min.NaN.f32 %0, %0, 0f00000000;" : "+f"(x));
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(low));
  return x;
#else
  return x > 0.0f ? 0.0f : x < low ? low : x;
#endif
}

// Two numbers rounded to bf16, the first in the lower half.
EK_HD uint32_t packed_bf16(float first, float second) {
#ifdef __CUDA_ARCH__
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
#else
  return uint32_t(cute::bfloat16_t(second).storage) << 16 | cute::bfloat16_t(first).storage;
#endif
}

// Lane q of a quad gives its word a to lane a, as that lane's word q.
EK_DEVICE void transpose_quad(uint32_t (&word)[4], int lane) {
  CUTE_UNROLL
  for (int bit = 1; bit < 4; bit *= 2) {
    bool const upper = lane & bit;
    CUTE_UNROLL
    for (int a = 0; a < 4; ++a) {
      if (a & bit) continue;
      uint32_t const sent = upper ? word[a] : word[a + bit];
      uint32_t const got = __shfl_xor_sync(0xffffffffu, sent, bit);
      word[a] = upper ? got : word[a];
      word[a + bit] = upper ? word[a + bit] : got;
    }
  }
}

// The sum of value[r] over the eight lanes of a warp that have the same columns, for the r-th of
// them. Each step adds two halves of the lanes, and leaves half of the values.
EK_DEVICE float sum_over_rows(float (&value)[kStored], int r) {
  CUTE_UNROLL
  for (int half = kStored / 2; half > 0; half /= 2) {
    bool const upper = r & half;
    CUTE_UNROLL
    for (int k = 0; k < half; ++k) {
      float const sent = upper ? value[k] : value[k + half];
      float const kept = upper ? value[k + half] : value[k];
      value[k] = kept + __shfl_xor_sync(0xffffffffu, sent, 4 * half);
    }
  }
  return value[0];
}

// Columns of a row, bf16, of which `count` are there.
EK_DEVICE void store_columns(uint16_t* to, uint32_t const (&word)[4], int count) {
  if (count >= kStored) {
    *reinterpret_cast<uint4*>(to) = make_uint4(word[0], word[1], word[2], word[3]);
    return;
  }
  // A loop, for it stands in the code as often as the store above.
  uint64_t low = uint64_t(word[1]) << 32 | word[0], high = uint64_t(word[3]) << 32 | word[2];
  CUTE_NO_UNROLL
  for (int k = 0; k < count; ++k) {
    to[k] = uint16_t(low);
    low = low >> 16 | high << 48;
    high >>= 16;
  }
}

// A row, as its gradient needs it; zeros where it is not there.
struct DlogitsRow {
  float peak = 0.0f;
  float inverse = 0.0f;
  float log_sum = 0.0f;
  float factor = 0.0f;  // rest - g_logprob
  float g_entropy = 0.0f;
  float at_target = 0.0f;  // dz there
  int own_target = -1;     // which of this thread's columns that is
  bool inside = false;

  EK_HD float logprob(float z) const {
    return clamped((z - peak) * inverse - log_sum, kLeastLogprob);
  }
};

// One thread's part of a tile. z: its logits with bias, not yet capped; c: where they are in the
// tile. Rows 2 m and 2 m + 1 are 8 apart, and among the 16 of one warp. Lanes 4 r to 4 r + 3, a
// quad, share the r-th of each eight rows, and have two of each eight columns each.
template <bool kSoftcap, class View, class Coordinates>
struct DlogitsThread {
  Head const& head;
  Dlogits const& out;
  View const& z;
  Coordinates const& c;
  int start_row;     // of the tile, in C
  int start_column;  // of the tile, in N
  int end;           // rows that are there
  int columns;       // of the tile, that are there
  int lane;

  EK_DEVICE void run() const {
    CUTE_UNROLL
    for (int m = 0; m < cute::size<0>(z) / 2; ++m) {
      int const first = start_row + cute::get<0>(c(2 * m, 0)) - lane / 4;
      if (first >= end) continue;  // the whole warp
      int const at = first + lane / 4;
      DlogitsRow const row[2] = {load(2 * m, at), load(2 * m + 1, at + 8)};
      CUTE_UNROLL
      for (int g = 0; g < cute::size<1>(z) / kStored; ++g) {
        float dz[2][kStored];
        gradients(row, m, g, dz);
        // The columns of all groups are at the same places of their group.
        int const shift = start_column + cute::get<1>(c(0, g * kStored)) - cute::get<1>(c(0, 0));
        if (out.bias_partials != nullptr) store_partial(row, dz, first, shift);
        store(row, dz, at, shift);
      }
    }
  }

 private:
  EK_DEVICE float logprob(DlogitsRow const& row, float logit) const {
    return row.logprob(kSoftcap ? capped(logit, head.softcap) : logit);
  }

  EK_DEVICE float slope(float logit) const {
    return kSoftcap ? cap_slope(logit, head.softcap) : 1.0f;
  }

  EK_DEVICE DlogitsRow load(int i, int at) const {
    DlogitsRow row;
    row.inside = at < end;
    if (!row.inside) return row;
    float const* field = out.fields + at;
    int64_t const next = head.rows;
    row.peak = field[0];
    row.inverse = field[next];
    row.log_sum = field[2 * next];
    float const g_logprob = field[3 * next];
    row.g_entropy = out.has_entropy ? field[4 * next] : 0.0f;
    float const rest = field[5 * next];
    row.factor = rest - g_logprob;
    int64_t const target = out.target[at] - out.start - start_column;
    if (target < 0 || target >= columns) return row;
    // Only the tile's own logit has an exact difference from forward's maximum: both are one sum.
    float logit = 0.0f;
    CUTE_UNROLL
    for (int j = 0; j < cute::size<1>(z); ++j) {
      if (cute::get<1>(c(i, j)) != int(target)) continue;
      row.own_target = j;
      logit = z(i, j);
    }
    if (row.own_target < 0) return row;
    float const logp = logprob(row, logit);
    float const dz = exp2_approx(logp * kLog2e) * (rest - row.g_entropy * logp);
    row.at_target = slope(logit) * (dz - g_logprob * expm1(logp));
    return row;
  }

  // dz of rows 2 m and 2 m + 1, and of the columns of group g.
  EK_DEVICE void gradients(DlogitsRow const (&row)[2], int m, int g,
                           float (&dz)[2][kStored]) const {
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      CUTE_UNROLL
      for (int k = 0; k < kStored; ++k) {
        float const logit = z(2 * m + h, g * kStored + k);
        float const logp = logprob(row[h], logit);
        float const p = exp2_approx(logp * kLog2e);
        dz[h][k] = slope(logit) * (p * (row[h].factor - row[h].g_entropy * logp));
      }
      int const own = row[h].own_target - g * kStored;
      if (own < 0 || own >= kStored) continue;
      CUTE_UNROLL
      for (int k = 0; k < kStored; ++k) dz[h][k] = own == k ? row[h].at_target : dz[h][k];
    }
  }

  // The bias's gradient of the warp's 16 rows from `first` on: a column for each lane.
  EK_DEVICE void store_partial(DlogitsRow const (&row)[2], float const (&dz)[2][kStored], int first,
                               int shift) const {
    float sum[kStored];
    CUTE_UNROLL
    for (int k = 0; k < kStored; ++k) {
      sum[k] = (row[0].inside ? dz[0][k] : 0.0f) + (row[1].inside ? dz[1][k] : 0.0f);
    }
    float const total = sum_over_rows(sum, lane / 4);
    int const column = shift + cute::get<1>(c(0, lane / 4));
    if (column >= start_column + columns) return;
    out.bias_partials[int64_t(first / kBiasRows) * out.stride_dz + column] = total;
  }

  // dz of one atom's eight columns for each lane of a quad, in both rows.
  EK_DEVICE void store(DlogitsRow const (&row)[2], float const (&dz)[2][kStored], int at,
                       int shift) const {
    int const own = lane % 4 * 2;
    int const column = shift + cute::get<1>(c(0, own)) - own;
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      uint32_t word[4];
      CUTE_UNROLL
      for (int a = 0; a < 4; ++a) word[a] = packed_bf16(dz[h][2 * a], dz[h][2 * a + 1]);
      transpose_quad(word, lane);
      int64_t const line = (at + 8 * h) * out.stride_dz;
      auto* const to = static_cast<uint16_t*>(out.dz) + line + column;
      if (row[h].inside) store_columns(to, word, start_column + columns - column);
    }
  }
};

// An Operation (collective.h): dz of the rows and columns of a tile. No thread waits for another.
struct DlogitsTile {
  Head head;
  Dlogits out;

  template <class Tile, class TiledMma>
  static constexpr int shared_bytes() {
    return 0;
  }

  template <class Tile, class Engine, class Layout0, class TiledMma>
  EK_DEVICE void operator()(Tile tile, int block, int split, int end,
                            cute::Tensor<Engine, Layout0>& accumulators, TiledMma mma, int thread,
                            void*) const {
    int const start_row = block * cute::size<0>(tile);
    int const start_column = split * cute::size<1>(tile);
    int const left = out.stop - out.start - start_column;
    int const columns = left < cute::size<1>(tile) ? left : int(cute::size<1>(tile));
    auto z = rows_and_columns(accumulators);
    auto const c = coordinates(tile, mma, thread);
    if (head.bias != nullptr) add_bias(z, c, start_column, columns);
    if (head.softcap == 0.0f)
      run<false>(z, c, start_row, start_column, end, columns, thread);
    else
      run<true>(z, c, start_row, start_column, end, columns, thread);
  }

 private:
  template <class View, class Coordinates>
  EK_DEVICE void add_bias(View& z, Coordinates const& c, int start_column, int columns) const {
    CUTE_UNROLL
    for (int j = 0; j < cute::size<1>(z); ++j) {
      int const column = cute::get<1>(c(0, j));
      if (column >= columns) continue;
      float const bias = bf16_at(head.bias, int64_t(out.start) + start_column + column);
      CUTE_UNROLL
      for (int i = 0; i < cute::size<0>(z); ++i) z(i, j) += bias;
    }
  }

  template <bool kSoftcap, class View, class Coordinates>
  EK_DEVICE void run(View const& z, Coordinates const& c, int start_row, int start_column, int end,
                     int columns, int thread) const {
    DlogitsThread<kSoftcap, View, Coordinates>{head,         out, z,       c,          start_row,
                                               start_column, end, columns, thread % 32}
        .run();
  }
};

}  // namespace ek
