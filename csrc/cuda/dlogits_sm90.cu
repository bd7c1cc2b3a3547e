// dz on Hopper, compiled once for each EK_COLUMNS (128, 256). The product is that of forward's tile
// of as many columns, so that every logit has the same bits.
#include "dlogits_kernels.h"
#include "dlogits_tile.h"
#include "product_sm90.h"

namespace ek {

template <int kColumns>
void dlogits_sm90(Head const& head, Dlogits const& out, int processors, Stream stream) {
  ProductSm90<kColumns, DlogitsTile>::launch("dlogits_sm90", head, out.start, out.stop - out.start,
                                             {out.first, out.number, head.rows}, {head, out},
                                             processors, stream);
}

template void dlogits_sm90<EK_COLUMNS>(Head const&, Dlogits const&, int, Stream);

}  // namespace ek
