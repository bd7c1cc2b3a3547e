// The extra statistics per row: varentropy, the largest p, the sums of p^2 and of p^2 log p, the
// mean logit, and whether the target is the first of the largest logits.
//
// The first four need three sums beside s and t of running_sums.h, relative to the same maximum m
// and without the same logit:
//   u = sum_j d_j^2 exp(d_j),  s2 = sum_j exp(2 d_j),  t2 = sum_j d_j exp(2 d_j)
// With Z = 1 + s and L = log1p(s),
//   varentropy = (u + (u s - t^2)) / Z^2,  largest p = 1 / Z
//   sum p^2 = (1 + s2) / Z^2,  sum p^2 log p = (t2 - L (1 + s2)) / Z^2
// u s - t^2 is not negative (Cauchy-Schwarz), so nothing cancels where the entropy is small.
// Sums of a tile are fp32, sums of tiles fp64. The first maximum is known by its column, which is
// compared with the target's.
#pragma once

#include <algorithm>
#include <cmath>

#include "head.h"
#include "product.h"

namespace EK_ISA {

using entropy_kernels::Head;

// Its square is the smallest normal number: too small to change a sum that holds 1, and not slow
// as subnormals are.
constexpr float kSmallest = 0x1p-63f;

// Logits are multiplied by it in the sums of a tile, so that none overflows: a power of two, at
// most 1 / kTileRows.
constexpr float kShare = 0x1p-7f;

// Stands in for Statistics where they are not wanted.
struct NoStatistics {
  struct Tile {
    void add(Vec, Vec) {}
  };
  struct Logits {
    void add(Vec) {}
  };

  void start(int) {}
  void rise(int, std::int64_t) {}
  void move(int, double, double, double, double, double) {}
  void add(const NoStatistics&, int) {}
  void add(const Tile&, int) {}
  void add(const Logits&, int) {}
  void join(const NoStatistics&, int, bool) {}
  void finish(const Head&, int, double, double, double, std::int64_t, float*) const {}
};

// The sums of a panel of tokens.
struct Statistics {
  double u[kPanel], s2[kPanel], t2[kPanel];
  double logits[kPanel];       // kShare times their sum
  std::int64_t first[kPanel];  // the column of the first maximum

  struct Tile {
    Vec u{}, s2{}, t2{};

    // The order of the factors leaves e * d to t's own fused addition, so t has the same bits with
    // and without statistics.
    void add(Vec e, Vec d) {
      const Vec normal = larger(splat(kSmallest), e), e2 = normal * normal;
      u += e * (d * d);
      s2 += e2;
      t2 += e2 * d;
    }
  };

  // Logits of one vector of tokens, before any of them is overwritten.
  struct Logits {
    Vec sum{};
    void add(Vec z) { sum += z * splat(kShare); }
  };

  void start(int i) {
    u[i] = s2[i] = t2[i] = logits[i] = 0.0;
    first[i] = -1;
  }

  // The logit of `column` exceeds those of all columns before it.
  void rise(int i, std::int64_t column) { first[i] = column; }

  // Moves the sums to a larger maximum, a = exp(shift). t and sum = s + present are from before it.
  void move(int i, double shift, double a, double t, double sum, double present) {
    const double a2 = a * a, sum2 = s2[i] + present;
    u[i] = a * u[i] + (a == 0 ? 0 : a * shift * (2 * t + sum * shift));
    t2[i] = a2 * t2[i] + (a2 == 0 ? 0 : a2 * sum2 * shift);
    s2[i] = a2 * sum2;
  }

  void add(const Statistics& other, int i) {
    u[i] += other.u[i];
    s2[i] += other.s2[i];
    t2[i] += other.t2[i];
  }

  // Takes what needs no maximum from sums of later columns, and their first maximum if it is
  // higher.
  void join(const Statistics& later, int i, bool higher) {
    logits[i] += later.logits[i];
    if (higher) first[i] = later.first[i];
  }

  // Adds a tile's sums to tokens [j, j + kLanes) of the panel.
  void add(const Tile& tile, int j) {
    float part[3][kLanes];
    store(part[0], tile.u), store(part[1], tile.s2), store(part[2], tile.t2);
    for (int i = 0; i < kLanes; ++i) {
      u[j + i] += part[0][i];
      s2[j + i] += part[1][i];
      t2[j + i] += part[2][i];
    }
  }

  void add(const Logits& tile, int j) {
    float part[kLanes];
    store(part, tile.sum);
    for (int i = 0; i < kLanes; ++i) logits[j + i] += part[i];
  }

  // Writes into out [6, tokens]. `zero` is 0, or NaN if the token has no distribution. s is 0 if
  // all of the token's mass lies on one logit.
  void finish(const Head& head, int i, double s, double t, double zero, std::int64_t token,
              float* out) const {
    const std::int64_t tokens = head.tokens;
    const double temperature = head.temperature == nullptr ? 1.0 : head.temperature[token];
    const double second = s == 0 ? 0 : u[i], squares = 1 + (s == 0 ? 0 : s2[i]);
    const double weighted = s == 0 ? 0 : t2[i], z = 1 + s;
    const double apart = std::max(second * s - t * t, 0.0);
    out[token] = float(zero + (second + apart) / (z * z));
    out[tokens + token] = float(zero + 1 / z);
    out[2 * tokens + token] = float(zero + squares / (z * z));
    out[3 * tokens + token] = float(zero + (weighted - std::log1p(s) * squares) / (z * z));
    out[4 * tokens + token] = float(zero + logits[i] / (kShare * head.vocabulary * temperature));
    out[5 * tokens + token] = float(zero + (first[i] == head.target[token]));
  }
};

}  // namespace EK_ISA
