// dz on Ampere and Ada, with the product of forward's tile, so that every logit has the same bits.
#include "dlogits_kernels.h"
#include "dlogits_tile.h"
#include "product_sm80.h"

namespace ek {

void dlogits_sm80(Head const& head, Dlogits const& out, int, Stream stream) {
  product_sm80<DlogitsTile>("dlogits_sm80", head, out.start, out.stop - out.start,
                            {out.first, out.number, head.rows}, {head, out}, stream);
}

}  // namespace ek
