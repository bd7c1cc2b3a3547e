// Forward statistics on Ampere and Ada, compiled once for each EK_STATISTICS.
#include "forward_kernels.h"
#include "forward_tile.h"
#include "product_sm80.h"

namespace ek {

template <bool kStatistics>
void forward_sm80(Head const& head, Forward const& out, int, Stream stream) {
  product_sm80<ForwardTile<kStatistics>>("forward_sm80", head, 0, head.vocabulary,
                                         {nullptr, out.number, head.rows}, {head, out}, stream);
}

template void forward_sm80<EK_STATISTICS != 0>(Head const&, Forward const&, int, Stream);

}  // namespace ek
