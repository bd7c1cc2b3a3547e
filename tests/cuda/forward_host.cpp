// Every tile that is compiled, with every option.
#include "forward_grid.h"

namespace {

template <bool kStatistics>
void check_all() {
  grid::Options const all[] = {
      {"plain", 128, 512, 128},
      {"one row, a tail", 1, 257, 1},
      {"bias and temperatures", 200, 700, 200, true, false, false, 1},
      {"softcap, two thirds of the rows", 300, 385, 200, false, true, false, 0},
      {"everything", 150, 515, 131, true, true, true, 2},
      {"no rows", 140, 300, 0, true, true, true, 1},
  };
  for (auto const& options : all) {
    grid::check<ek::Sm90Tile<256>, kStatistics>(options, 2, 2);
    grid::check<ek::Sm90Tile<128>, kStatistics>(options, 2, 3, 2);
    grid::check<ek::Sm80Tile, kStatistics>(options);
  }
}

}  // namespace

int main() {
  simt::seed = 3;
  check_all<false>();
  check_all<true>();
  return !grid::right;
}
