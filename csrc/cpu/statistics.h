// The extra statistics per row: varentropy, the largest p, and the sums of p^2 and of p^2 log p.
//
// They need three sums beside s and t of running_sums.h, relative to the same maximum m and without
// the same logit:
//   u = sum_j d_j^2 exp(d_j),  s2 = sum_j exp(2 d_j),  t2 = sum_j d_j exp(2 d_j)
// With Z = 1 + s and L = log1p(s),
//   varentropy = (u + (u s - t^2)) / Z^2,  largest p = 1 / Z
//   sum p^2 = (1 + s2) / Z^2,  sum p^2 log p = (t2 - L (1 + s2)) / Z^2
// u s - t^2 is not negative (Cauchy-Schwarz), so nothing cancels where the entropy is small.
// Sums of a tile are fp32, sums of tiles fp64.
#pragma once

#include <algorithm>
#include <cmath>

#include "product.h"

namespace EK_ISA {

// Its square is the smallest normal number: too small to change a sum that holds 1, and not slow
// as subnormals are.
constexpr float kSmallest = 0x1p-63f;

// Stands in for Statistics where they are not wanted.
struct NoStatistics {
  struct Tile {
    void add(Vec, Vec) {}
  };

  void start(int) {}
  void move(int, double, double, double, double, double) {}
  void add(const NoStatistics&, int) {}
  void add(const Tile&, int) {}
  void finish(int, double, double, double, std::int64_t, std::int64_t, float*) const {}
};

// The sums of a panel of tokens.
struct Statistics {
  double u[kPanel], s2[kPanel], t2[kPanel];

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

  void start(int i) { u[i] = s2[i] = t2[i] = 0.0; }

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

  // Adds a tile's sums to tokens [first, first + kLanes) of the panel.
  void add(const Tile& tile, int first) {
    float part[3][kLanes];
    store(part[0], tile.u), store(part[1], tile.s2), store(part[2], tile.t2);
    for (int i = 0; i < kLanes; ++i) {
      u[first + i] += part[0][i];
      s2[first + i] += part[1][i];
      t2[first + i] += part[2][i];
    }
  }

  // Writes into out [4, tokens]. `zero` is 0, or NaN if the token has no distribution. s is 0 if
  // all of the token's mass lies on one logit.
  void finish(int i, double s, double t, double zero, std::int64_t token, std::int64_t tokens,
              float* out) const {
    const double second = s == 0 ? 0 : u[i], squares = 1 + (s == 0 ? 0 : s2[i]);
    const double weighted = s == 0 ? 0 : t2[i], z = 1 + s;
    const double apart = std::max(second * s - t * t, 0.0);
    out[token] = float(zero + (second + apart) / (z * z));
    out[tokens + token] = float(zero + 1 / z);
    out[2 * tokens + token] = float(zero + squares / (z * z));
    out[3 * tokens + token] = float(zero + (weighted - std::log1p(s) * squares) / (z * z));
  }
};

}  // namespace EK_ISA
