// Which tensor memory each thread of sm_100 reads, and which elements of the tile lie there.
#include <cstdio>
#include <vector>

#include "row_chunks.h"

using namespace cute;
using namespace ek::sm100;

int main() {
  Mma const mma;
  auto const tile = make_shape(Int<kPair * kRows>{}, Int<ek::kRowColumns>{});
  auto const accumulators = Mma::make_fragment_C(partition_shape_C(mma, tile));
  auto const chunks = chunks_of(accumulators(make_coord(_, _), _0{}, _0{}));
  auto const half = make_shape(Int<kRows>{}, Int<ek::kRowColumns>{});
  auto const places = chunks_of(make_identity_tensor(half));
  auto const reads = reads_of(chunks);
  int wrong = size(reads) != kRows || size<3>(chunks) != ek::kRowColumns / ek::kChunk;
  for (int thread = 0; thread < kRows; ++thread) {
    auto const slice = reads.get_slice(thread);
    auto const sources = slice.partition_S(chunks);
    auto const to = slice.partition_D(places);
    for (int chunk = 0; chunk < ek::kRowColumns / ek::kChunk; ++chunk) {
      // A warp reads its own 32 lanes; an address is lane and column.
      uint32_t const address = raw_pointer_cast(sources(_, _, _, _0{}, chunk).data());
      wrong += address != unsigned((thread / 32 * 32 << 16) + chunk * ek::kChunk);
      auto const held = to(_, _, _, _0{}, chunk);
      wrong += size(held) != ek::kChunk;
      for (int j = 0; j < ek::kChunk; ++j) {
        wrong += get<0>(held(j)) != thread || get<1>(held(j)) != chunk * ek::kChunk + j;
      }
    }
  }
  // The same of the accumulators: row and column of the half are lane and column of its memory.
  for (int row = 0; row < kRows; ++row)
    for (int column = 0; column < ek::kRowColumns; ++column) {
      int const place = accumulators.layout()(make_coord(make_coord(row, column), _0{}, _0{}));
      wrong += place != (row << 16) + column;
    }
  std::printf("%d wrong\n", wrong);
  return wrong != 0;
}
