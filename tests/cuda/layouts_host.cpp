// Which thread holds what of a tile, for every tile that is compiled (tiled_mma.h): each element
// once, a row of a view one row of the tile, and the threads of a row in aligned groups of four.
#include <cstdio>
#include <set>
#include <vector>

#include "fragment.h"
#include "tiled_mma.h"

template <class Tile>
bool holds(char const* name) {
  typename Tile::Shape const shape;
  typename Tile::Mma const mma;
  int const rows = cute::size<0>(shape), columns = cute::size<1>(shape);
  std::vector<int> owner(rows * columns, -1);
  std::vector<std::set<int>> warps(rows);
  bool right = true;
  for (int thread = 0; thread < cute::size(mma); ++thread) {
    auto const c = ek::coordinates(shape, mma, thread);
    // The registers of accumulators have the same order: what stands first in memory is first.
    auto fragment = cute::partition_fragment_C(mma, cute::select<0, 1>(shape));
    auto const plain = mma.get_thread_slice(thread).partition_C(
        cute::make_identity_tensor(cute::select<0, 1>(shape)));
    for (int e = 0; e < cute::size(fragment); ++e)
      fragment(e) = float(cute::get<0>(plain(e)) * columns + cute::get<1>(plain(e)));
    auto const z = ek::rows_and_columns(fragment);
    for (int i = 0; i < cute::size<0>(c); ++i) {
      int const row = cute::get<0>(c(i, 0));
      warps[row].insert(ek::warp_of_row(mma, thread));
      for (int lane = 1; lane < 4; ++lane)
        right &= row == cute::get<0>(ek::coordinates(shape, mma, thread ^ lane)(i, 0));
      for (int j = 0; j < cute::size<1>(c); ++j) {
        int const column = cute::get<1>(c(i, j));
        int& mine = owner[row * columns + column];
        right &= cute::get<0>(c(i, j)) == row && column == cute::get<1>(c(0, j));
        right &= z(i, j) == float(row * columns + column);
        right &= j % 2 == 0 || column == cute::get<1>(c(i, j - 1)) + 1;  // pairs of columns
        right &= mine == -1;
        mine = thread;
      }
    }
  }
  for (int const one : owner) right &= one >= 0;
  for (int row = 0; row < rows; ++row) {
    std::set<int> quads;
    for (int column = 0; column < columns; ++column)
      quads.insert(owner[row * columns + column] / 4);
    right &= int(quads.size()) == ek::kWarpsPerRow<typename Tile::Mma>;
    right &= warps[row].size() == quads.size();
    right &= *warps[row].begin() == 0 && *warps[row].rbegin() == int(quads.size()) - 1;
  }
  std::printf("%s: %d threads, %d warps per row: %s\n", name, int(cute::size(mma)),
              ek::kWarpsPerRow<typename Tile::Mma>, right ? "right" : "WRONG");
  return right;
}

int main() {
  bool right = holds<ek::Sm90Tile<256>>("sm90 128 x 256");
  right &= holds<ek::Sm90Tile<128>>("sm90 128 x 128");
  right &= holds<ek::Sm80Tile>("sm80 128 x 128");
  return !right;
}
