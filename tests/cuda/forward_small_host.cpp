// One tile whose warps share rows and one whose warps do not, with all options: for mutants, and
// for ThreadSanitizer.
#include "forward_grid.h"

int main() {
  grid::Options const options{"everything", 150, 515, 131, true, true, true, 2};
  simt::seed = 5;
  grid::check<ek::Sm80Tile, true>(options);
  grid::check<ek::Sm90Tile<128>, false>(options, 2, 3, 2);
  return !grid::right;
}
