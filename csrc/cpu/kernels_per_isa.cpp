// The kernels of one instruction set; compiled once per set, see isa.h.
#include "linear_logprob_entropy.h"
#include "linear_logprob_entropy_backward.h"
#include "pair_products.h"
#include "row_entropies.h"

#ifdef EK_TILES
#include "tiles.h"

// The kernels of the dtypes that have no tiles.
namespace EK_OTHERS {
extern const entropy_kernels::Kernels kernels;
}
#endif

namespace EK_ISA {

// The units that products of bf16 run on.
#if defined(EK_TILES)
using Brain = Tiles;
#elif defined(EK_BF16)
using Brain = BF16;
#else
using Brain = F32;
#endif

template <class E>
static std::int64_t forward_of(const ForwardCall& call, Stop stop) {
  return call.out.statistics != nullptr ? forward<E, Statistics>(call, stop)
                                        : forward<E, NoStatistics>(call, stop);
}

static std::int64_t forward_any(const ForwardCall& call, Stop stop) {
  if (call.head.dtype == Dtype::bf16) return forward_of<Brain>(call, stop);
#ifdef EK_TILES
  return EK_OTHERS::kernels.forward(call, stop);
#else
  return forward_of<F32>(call, stop);
#endif
}

static std::int64_t backward_any(const BackwardCall& call, Stop stop) {
  if (call.head.dtype == Dtype::bf16) return backward<Brain>(call, stop);
#ifdef EK_TILES
  return EK_OTHERS::kernels.backward(call, stop);
#else
  return backward<F32>(call, stop);
#endif
}

// The time of a product of zeros that fits the L1 cache; it has the same size for each E.
template <class E>
static double seconds_of() {
  constexpr int kDim = 64, kUnits = kDim / E::kWidth;
  const std::vector<typename E::Unit> operands(kTileRows * kDim);
  alignas(64) float c[kTileRows * kPanel];
  [[maybe_unused]] const Ready<E> ready{};
  const auto start = std::chrono::steady_clock::now();
  const Left<E> left{operands.data(), kUnits, 1};
  product<E>(kTileRows, left, operands.data(), kUnits, c, kPanel, false);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

static double seconds(Dtype dtype) {
  return dtype == Dtype::bf16 ? seconds_of<Brain>() : seconds_of<F32>();
}

// Numbers given as bf16, in units of E.
template <class E>
static std::vector<typename E::Unit> as_units(const std::vector<std::uint16_t>& bits) {
  std::vector<typename E::Unit> units(bits.size() / E::kWidth);
  read_row<E>(bits.data(), 0, std::int64_t(bits.size()), Dtype::bf16, units.data());
  return units;
}

// c = a b, then c += a b, with an odd number of rows and more than a chain along k.
template <class E>
static std::vector<float> sample_product() {
  constexpr int kHeight = 49, kDepth = 2 * (kChain + 21);
  std::vector<std::uint16_t> left(kHeight * kDepth), right(kPanel * kDepth);
  std::uint32_t random = 1;
  for (auto* values : {&left, &right})
    for (std::uint16_t& x : *values) {
      random = random * 1664525u + 1013904223u;
      x = to_bf16(float(std::int32_t(random)) * 0x1p-31f);
    }
  const auto a = as_units<E>(left), columns = as_units<E>(right);
  constexpr std::int64_t kUnits = kDepth / E::kWidth;
  std::vector<typename E::Unit> b(columns.size());
  const typename E::Unit* lanes[kPanel];
  for (int i = 0; i < kPanel; ++i) lanes[i] = columns.data() + i * kUnits;
  pack_rows<E>(lanes, kPanel, kUnits, b.data());
  std::vector<float> c(kHeight * kPanel);
  [[maybe_unused]] const Ready<E> ready{};
  for (const bool add : {false, true})
    product<E>(kHeight, Left<E>{a.data(), kUnits, 1}, b.data(), kUnits, c.data(), kPanel, add);
  return c;
}

// Sums of 298 products of up to 1 are 1e-5 apart by rounding, and 5 by a misplaced operand.
static bool agrees() {
  const std::vector<float> got = sample_product<Brain>(), want = sample_product<F32>();
  for (std::size_t i = 0; i < got.size(); ++i)
    if (!(std::abs(got[i] - want[i]) < 1e-3f)) return false;
  return true;
}

extern const entropy_kernels::Kernels kernels;
const entropy_kernels::Kernels kernels{EK_NAME,      seconds,   agrees,    forward_any,
                                       backward_any, pair_dots, pair_sums, row_entropies};

}  // namespace EK_ISA
