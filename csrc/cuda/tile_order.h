// Which tile a block of threads takes next. Tiles of rows that are not there are never taken,
// though the number of rows is known on the device alone.
#pragma once
#include <cstdint>

#include "kernel.h"

namespace ek {

// Row blocks that share a split's columns, so that both stay in the second-level cache.
constexpr int kGroup = 16;

// Rows [*first, *number) of `rows`; first may be null, for 0.
struct RowRange {
  int const* first;
  int const* number;
  int rows;

  EK_HD int end() const { return *number < rows ? *number : rows; }
};

// Clusters of `cluster` row blocks, of one split each. All blocks of a cluster move together, also
// where the last of them has no rows.
struct TileOrder {
  int first_block;
  int cluster;
  int clusters;  // that have rows
  int splits;

  TileOrder() = default;
  EK_HD TileOrder(RowRange const& range, int block_rows, int cluster, int splits)
      : first_block(range.first == nullptr ? 0 : (*range.first + block_rows - 1) / block_rows),
        cluster(cluster), splits(splits) {
    int const blocks = (range.end() + block_rows - 1) / block_rows - first_block;
    clusters = blocks > 0 ? (blocks + cluster - 1) / cluster : 0;
  }

  EK_HD bool has(int64_t unit) const { return unit < int64_t(clusters) * splits; }

  // The row block and the split of a unit, for the block of threads with this rank in its cluster.
  EK_HD void find(int64_t unit, int rank, int& block, int& split) const {
    // As there are fewer than 2^31 tiles: a division of 64 bits takes a hundred instructions.
    unsigned const group = kGroup / cluster, per_group = group * splits;
    int const first = int(unsigned(unit) / per_group * group);
    int const within = int(unsigned(unit) % per_group);
    int const left = clusters - first;
    int const size = left < int(group) ? left : int(group);
    block = first_block + (first + within % size) * cluster + rank;
    split = within / size;
  }
};

}  // namespace ek
