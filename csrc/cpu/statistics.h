// The sums behind varentropy, largest probability, and the sums of p^2 and p^2 log p.
//
// Beside s and t of linear_logprob_entropy.h, relative to the same maximum and with the same logit
// left out,
//   u = sum_j d_j^2 exp(d_j),  s2 = sum_j exp(2 d_j),  t2 = sum_j d_j exp(2 d_j)
// and with Z = 1 + s, L = log1p(s)
//   varentropy = (u + (u s - t^2)) / Z^2,  largest p = 1 / Z
//   sum p^2 = (1 + s2) / Z^2,  sum p^2 log p = (t2 - L (1 + s2)) / Z^2
// u s - t^2 is not negative (Cauchy and Schwarz), so nothing cancels where the entropy is small.
// Sums of a tile are fp32, sums of tiles fp64.
#pragma once

#include <algorithm>
#include <cmath>

#include "product.h"

namespace EK_ISA {

// Its square is the smallest normal number: a sum that holds 1 does not see it, and less is slow.
constexpr float kSmallest = 0x1p-63f;

// A panel's sums where nobody asks for them.
struct NoMoments {
  struct Tile {
    void add(Vec, Vec) {}
  };

  void start(int) {}
  void move(int, double, double, double, double, double) {}
  void add(const NoMoments&, int) {}
  void add(const Tile&, int) {}
  void finish(int, double, double, double, std::int64_t, std::int64_t, float*) const {}
};

// A panel's sums.
struct Moments {
  double u[kPanel], s2[kPanel], t2[kPanel];

  struct Tile {
    Vec u{}, s2{}, t2{};

    // In an order that leaves e * d to t, whose addition it is fused with: t keeps its bits.
    void add(Vec e, Vec d) {
      const Vec normal = larger(splat(kSmallest), e), e2 = normal * normal;
      u += e * (d * d);
      s2 += e2;
      t2 += e2 * d;
    }
  };

  void start(int i) { u[i] = s2[i] = t2[i] = 0.0; }

  // To a larger maximum, a = exp(shift): t and sum = s + present are those before the move.
  void move(int i, double shift, double a, double t, double sum, double present) {
    const double a2 = a * a, sum2 = s2[i] + present;
    u[i] = a * u[i] + (a == 0 ? 0 : a * shift * (2 * t + sum * shift));
    t2[i] = a2 * t2[i] + (a2 == 0 ? 0 : a2 * sum2 * shift);
    s2[i] = a2 * sum2;
  }

  void add(const Moments& other, int i) {
    u[i] += other.u[i];
    s2[i] += other.s2[i];
    t2[i] += other.t2[i];
  }

  // Tokens [first, first + kLanes) of the panel.
  void add(const Tile& tile, int first) {
    float part[3][kLanes];
    store(part[0], tile.u), store(part[1], tile.s2), store(part[2], tile.t2);
    for (int i = 0; i < kLanes; ++i) {
      u[first + i] += part[0][i];
      s2[first + i] += part[1][i];
      t2[first + i] += part[2][i];
    }
  }

  // Into out [4, tokens]; `valid` is 0, or NaN where the token has no distribution. An s of 0 is
  // that of a token all of whose mass lies on one logit.
  void finish(int i, double s, double t, double valid, std::int64_t token, std::int64_t tokens,
              float* out) const {
    const double second = s == 0 ? 0 : u[i], squares = 1 + (s == 0 ? 0 : s2[i]);
    const double weighted = s == 0 ? 0 : t2[i], z = 1 + s;
    const double apart = std::max(second * s - t * t, 0.0);
    out[token] = float(valid + (second + apart) / (z * z));
    out[tokens + token] = float(valid + 1 / z);
    out[2 * tokens + token] = float(valid + squares / (z * z));
    out[3 * tokens + token] = float(valid + (weighted - std::log1p(s) * squares) / (z * z));
  }
};

}  // namespace EK_ISA
