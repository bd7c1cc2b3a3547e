// The order of tiles: each tile that has rows exactly once, whatever the number of rows, the sizes
// of clusters and the grid; tiles of one group of rows together.
#include <cstdio>
#include <vector>

#include "tile_order.h"

namespace {

constexpr int kRows = 128;
bool right = true;

void expect(bool holds, char const* what, int got, int wanted) {
  if (!holds) std::printf("%s: got %d; wanted %d\n", what, got, wanted);
  right &= holds;
}

// first < 0: none is given.
void check(int rows, int first, int number, int cluster, int splits) {
  ek::RowRange const range{first < 0 ? nullptr : &first, &number, rows};
  ek::TileOrder const order(range, kRows, cluster, splits);
  int const end = number < rows ? number : rows,
            skipped = first < 0 ? 0 : (first + kRows - 1) / kRows;
  expect(range.end() == end, "the end", range.end(), end);
  int const most = (rows + kRows - 1) / kRows + 2 * cluster;
  std::vector<int> times(most * splits);
  int64_t unit = 0;
  int highest = 0;
  for (; order.has(unit); ++unit) {
    int first_split = -1;
    for (int rank = 0; rank < cluster; ++rank) {
      int block = -1, split = -1;
      order.find(unit, rank, block, split);
      if (rank == 0) first_split = split;
      bool const inside = block >= 0 && block < most && split >= 0 && split < splits;
      expect(inside, "a tile of the grid", block, split);
      expect(split == first_split, "one split per cluster", split, first_split);
      if (inside) ++times[block * splits + split];
      // A group's rows are done before the next group's begin.
      int const group = (block - skipped) / ek::kGroup;
      expect(group >= highest, "groups in turn", group, highest);
      highest = group;
    }
    if (unit > int64_t(most) * splits) break;
  }
  expect(!order.has(unit + 12345), "nothing follows the last", 1, 0);
  for (int block = 0; block < most; ++block) {
    for (int split = 0; split < splits; ++split) {
      int const got = times[block * splits + split];
      bool const has_rows = block >= skipped && block * kRows < end;
      // A cluster's last blocks may have none.
      bool const beside = block >= skipped &&
                          (block - skipped) / cluster * cluster + skipped <= (end - 1) / kRows &&
                          end > skipped * kRows;
      expect(has_rows ? got == 1 : got <= int(beside), "times of a tile", got, has_rows);
    }
  }
}

}  // namespace

int main() {
  for (int const rows : {1, 128, 129, 300, 2048, 2049, 5000})
    for (int const number : {0, 1, 127, 128, 129, 257, 2048, 2177, 4999, 9999})
      for (int const first : {-1, 0, 200, 256, 2304})
        for (int const cluster : {1, 2})
          for (int const splits : {1, 2, 37}) check(rows, first, number, cluster, splits);
  // The largest grid has almost 2^31 tiles.
  int const number = 1 << 30;
  ek::TileOrder const order({nullptr, &number, number}, kRows, 2, 255);
  int block, split;
  order.find(int64_t(order.clusters) * order.splits - 1, 1, block, split);
  expect(block == number / kRows - 1, "the last block", block, number / kRows - 1);
  expect(split == 254, "the last split", split, 254);
  return !right;
}
