// The entropy of every row of logits, in one pass over memory.
//
// A row is walked in blocks that stay in the L1 cache, where a block is read twice: for its
// maximum, and for the sums of running_sums.h. Parts of a row are summed by themselves and merged
// in order, so the bits are the same at any number of threads.
#pragma once

#include <cfloat>

#include "running_sums.h"
#include "threads.h"

namespace EK_ISA {

using entropy_kernels::RowEntropies;
using entropy_kernels::Stop;

constexpr std::int64_t kRowBlock = 4096;     // logits of a block: 16 KB as fp32
constexpr std::int64_t kRowPart = 1 << 15;   // logits of a part
constexpr std::int64_t kRowsTogether = 256;  // rows whose sums are kept at once
constexpr int kRowSums = 4;                  // vectors of sums
constexpr int kStep = kRowSums * kLanes;

// A temperature. Its inverse is the sum of two fp32, so d * high + d * low is d / temperature to
// rounding.
struct Temperature {
  double value;
  float lowest, high, low;  // `lowest` / temperature is kLowestExponent
  explicit Temperature(double value)
      : value(value), lowest(float(kLowestExponent * value)), high(float(1 / value)),
        low(float(1 / value - high)) {}
};

// The sums of a part of a row; see running_sums.h. `present` is 0 before the first logit above
// -inf, then 1.
struct RowSums {
  double max = -FLT_MAX, present = 0, s = 0, t = 0;

  void move(double to, double temperature) {
    const double shift = (max - to) / temperature;
    move_sums(shift, std::exp(shift), s + present, s, t);
    present = 1;
    max = to;
  }

  void merge(RowSums other, double temperature) {
    if (other.present != 0) {
      if (present == 0 || other.max > max)
        move(other.max, temperature);
      else
        other.move(max, temperature);
      t += other.t;
    }
    s += other.s;  // may be a NaN
  }

  // NaN for a row without a distribution: one of -inf alone, or one that has inf or NaN.
  float entropy(std::int64_t vocabulary) const {
    if (present == 0 || max > FLT_MAX || s != s) return std::numeric_limits<float>::quiet_NaN();
    if (is_vanishing(s, vocabulary + kRowBlock)) return 0;
    return float(std::log1p(s) - t / (1 + s));
  }
};

// A block of logits as fp32, filled up with -inf to a whole number of steps.
struct RowBlock {
  alignas(64) float values[kRowBlock];
  std::int64_t size;

  // Reads `count` logits and returns the largest; -inf if there is none.
  template <Dtype kDtype>
  float read(const char* from, std::int64_t count) {
    constexpr std::int64_t kBytes = kLanes * bytes_of(kDtype);
    const Vec lowest = splat(-std::numeric_limits<float>::infinity());
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes, from += kBytes)
      store(values + i, widened<kDtype>(from));
    if (i < count) store(values + i, widened_tail<kDtype>(from, count - i));
    size = (count + kStep - 1) / kStep * kStep;
    std::fill(values + count, values + size, lowest[0]);
    Vec top[kRowSums] = {lowest, lowest, lowest, lowest};
    for (i = 0; i < size; i += kStep)
#pragma GCC unroll 8
      for (int k = 0; k < kRowSums; ++k) top[k] = larger(load(values + i + k * kLanes), top[k]);
    float lanes[kLanes], highest = lowest[0];
    store(lanes, larger(larger(top[0], top[1]), larger(top[2], top[3])));
    for (const float lane : lanes) highest = std::max(highest, lane);
    return highest;
  }

  // Leaves out the first logit that equals `value`.
  void leave_out(float value) {
    std::int32_t at = kRowBlock;
    for (std::int32_t i = 0; i < std::int32_t(size); ++i)
      at = std::min(at, values[i] == value ? i : std::int32_t(kRowBlock));
    values[at] = -std::numeric_limits<float>::infinity();
  }

  // Adds exp(d) to s and d exp(d) to t.
  template <bool kScaled>
  void add(const Temperature& temperature, RowSums& sums) const {
    const Vec max = splat(float(sums.max)), low = splat(temperature.lowest);
    const Vec factor = splat(temperature.high), rest = splat(temperature.low);
    Vec s[kRowSums] = {}, t[kRowSums] = {};
    for (std::int64_t i = 0; i < size; i += kStep)
#pragma GCC unroll 8
      for (int k = 0; k < kRowSums; ++k) {
        Vec d = larger(low, load(values + i + k * kLanes) - max);
        if (kScaled) d = d * factor + d * rest;
        const Vec e = exp_nonpositive(d);
        s[k] += e;
        t[k] += e * d;
      }
    float lanes[2][kLanes];
    store(lanes[0], (s[0] + s[1]) + (s[2] + s[3]));
    store(lanes[1], (t[0] + t[1]) + (t[2] + t[3]));
    for (int i = 0; i < kLanes; ++i) sums.s += lanes[0][i], sums.t += lanes[1][i];
  }
};

template <Dtype kDtype>
static RowSums sum_part(const char* from, std::int64_t count, const Temperature& temperature) {
  RowSums sums;
  RowBlock block;
  for (std::int64_t at = 0; at < count; at += kRowBlock) {
    const std::int64_t size = std::min(kRowBlock, count - at);
    const float highest = block.read<kDtype>(from + at * bytes_of(kDtype), size);
    if (highest > sums.max || (sums.present == 0 && highest == -FLT_MAX)) {
      block.leave_out(highest);
      sums.move(highest, temperature.value);
    }
    if (temperature.value == 1)
      block.add<false>(temperature, sums);
    else
      block.add<true>(temperature, sums);
  }
  return sums;
}

static std::int64_t row_entropies(const RowEntropies& call, Stop stop) {
  Interrupt interrupted(stop);
  const std::int64_t vocabulary = call.vocabulary;
  const std::int64_t parts = ceil_div(vocabulary, kRowPart);
  const auto temperature = [&](std::int64_t row) {
    const double one =
        call.temperature == nullptr ? 1 : call.temperature[row * call.temperature_stride];
    return Temperature(one);
  };
  std::vector<RowSums> sums(std::min(call.rows, kRowsTogether) * parts);
  for (std::int64_t first = 0; first < call.rows && !interrupted(); first += kRowsTogether) {
    const std::int64_t rows = std::min(kRowsTogether, call.rows - first);
    const int threads = int(
        std::clamp<std::int64_t>(rows * vocabulary / kRowPart, 1, usable_threads(call.threads)));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t item = 0; item < rows * parts; ++item) {
      if (interrupted()) continue;
      const std::int64_t row = first + item / parts, begin = item % parts * kRowPart;
      const char* from = row_of(call.logits, row) + begin * bytes_of(call.logits.dtype);
      sums[item] = with_dtype(call.logits.dtype, [&](auto dtype) {
        return sum_part<dtype.value>(from, std::min(kRowPart, vocabulary - begin),
                                     temperature(row));
      });
    }
    for (std::int64_t row = 0; row < rows; ++row) {
      RowSums all;
      for (std::int64_t part = 0; part < parts; ++part)
        all.merge(sums[row * parts + part], temperature(first + row).value);
      call.out[first + row] = all.entropy(vocabulary);
    }
  }
  return interrupted() ? -1 : 0;
}

}  // namespace EK_ISA
