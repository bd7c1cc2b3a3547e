// The kernels of dz that are compiled, one object each.
#pragma once
#include "launch.h"

namespace ek {

void dlogits_sm80(Head const&, Dlogits const&, int processors, Stream);
template <int kColumns>
void dlogits_sm90(Head const&, Dlogits const&, int processors, Stream);

}  // namespace ek
