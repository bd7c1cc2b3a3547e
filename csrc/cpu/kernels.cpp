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

extern const entropy_kernels::Kernels kernels;
const entropy_kernels::Kernels kernels{EK_NAME, forward_any, backward_any};

}  // namespace EK_ISA
