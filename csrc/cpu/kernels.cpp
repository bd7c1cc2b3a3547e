// Compiled once for each instruction set: EK_ISA is its namespace, EK_LANES its floats a vector.
#include "linear_logprob_entropy_backward.h"

namespace EK_ISA {

template <class E>
static std::int64_t forward_of(const Head& head, const Rows& rows, const Statistics& out,
                               Stop stop) {
  return out.moments != nullptr ? forward<E, Moments>(head, rows, out, stop)
                                : forward<E, NoMoments>(head, rows, out, stop);
}

static std::int64_t forward_any(const Head& head, const Rows& rows, const Statistics& out, Stop stop) {
#ifdef EK_BF16
  if (head.dtype == Dtype::bf16) return forward_of<BF16>(head, rows, out, stop);
#endif
  return forward_of<F32>(head, rows, out, stop);
}

static std::int64_t backward_any(const Head& head, const Rows& rows, const Statistics& found,
                         const Incoming& in, const Gradients& out, Stop stop) {
#ifdef EK_BF16
  if (head.dtype == Dtype::bf16) return backward<BF16>(head, rows, found, in, out, stop);
#endif
  return backward<F32>(head, rows, found, in, out, stop);
}

// A product of zeros that fits the L1 cache, of the same size for each E.
template <class E>
static double seconds_of() {
  constexpr int kDim = 64, kUnits = kDim / E::kWidth, kHeight = 4 * kRows;
  static const typename E::Unit operands[kDim * kPanel] = {};
  alignas(64) float c[kHeight * kPanel];
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 4; ++i)
    product<E>(kHeight, Left<E>{operands, kUnits, 1}, operands, kUnits, c, kPanel, i > 0);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

static double seconds(Dtype dtype) {
#ifdef EK_BF16
  if (dtype == Dtype::bf16) return seconds_of<BF16>();
#endif
  (void)dtype;
  return seconds_of<F32>();
}

extern const entropy_kernels::Kernels kernels;
const entropy_kernels::Kernels kernels{EK_NAME, seconds, forward_any, backward_any};

}  // namespace EK_ISA
