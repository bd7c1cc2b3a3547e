// Forward statistics on Hopper, compiled once for each EK_COLUMNS (128, 256) and EK_STATISTICS.
#include "forward_kernels.h"
#include "forward_tile.h"
#include "product_sm90.h"

namespace ek {

template <int kColumns, bool kStatistics>
void forward_sm90(Head const& head, Forward const& out, int processors, Stream stream) {
  ProductSm90<kColumns, ForwardTile<kStatistics>>::launch("forward_sm90", head, 0, head.vocabulary,
                                                          {nullptr, out.number, head.rows},
                                                          {head, out}, processors, stream);
}

template void forward_sm90<EK_COLUMNS, EK_STATISTICS != 0>(Head const&, Forward const&, int,
                                                           Stream);

}  // namespace ek
