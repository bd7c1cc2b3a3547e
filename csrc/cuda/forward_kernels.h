// The forwards that are compiled, one object each.
#pragma once
#include "launch.h"

namespace ek {

template <bool kStatistics>
void forward_sm80(Head const&, Forward const&, int processors, Stream);
template <int kColumns, bool kStatistics>
void forward_sm90(Head const&, Forward const&, int processors, Stream);
template <bool kStatistics>
void forward_sm100(Head const&, Forward const&, int processors, Stream);

}  // namespace ek
