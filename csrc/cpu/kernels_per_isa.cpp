// Compiled once for each instruction set: EK_ISA is its namespace, EK_LANES its floats a vector.
#ifdef EK_TILES
#include "tiles.h"
#else
#include "linear_logprob_entropy_backward.h"
#endif

#ifdef EK_TILES
// Whose kernels take the dtypes that have no tiles.
namespace EK_OTHERS {
extern const entropy_kernels::Kernels kernels;
}
#endif

namespace EK_ISA {

// What products of bf16 run on.
#if defined(EK_TILES)
using Brain = Tiles;
#elif defined(EK_BF16)
using Brain = BF16;
#else
using Brain = F32;
#endif

template <class E>
static std::int64_t forward_of(const Head& head, const Rows& rows, const Statistics& out,
                               Stop stop) {
  return out.moments != nullptr ? forward<E, Moments>(head, rows, out, stop)
                                : forward<E, NoMoments>(head, rows, out, stop);
}

static std::int64_t forward_any(const Head& head, const Rows& rows, const Statistics& out,
                                Stop stop) {
  if (head.dtype == Dtype::bf16) return forward_of<Brain>(head, rows, out, stop);
#ifdef EK_TILES
  return EK_OTHERS::kernels.forward(head, rows, out, stop);
#else
  return forward_of<F32>(head, rows, out, stop);
#endif
}

static std::int64_t backward_any(const Head& head, const Rows& rows, const Statistics& found,
                                 const Incoming& in, const Gradients& out, Stop stop) {
  if (head.dtype == Dtype::bf16) return backward<Brain>(head, rows, found, in, out, stop);
#ifdef EK_TILES
  return EK_OTHERS::kernels.backward(head, rows, found, in, out, stop);
#else
  return backward<F32>(head, rows, found, in, out, stop);
#endif
}

// A product of zeros that fits the L1 cache, of the same size for each E.
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

// The same numbers as units of E.
template <class E>
static std::vector<typename E::Unit> units_of(const std::vector<std::uint16_t>& bits) {
  std::vector<typename E::Unit> units(bits.size() / E::kWidth);
  read_row<E>(bits.data(), 0, std::int64_t(bits.size()), Dtype::bf16, units.data());
  return units;
}

// c += a b twice, of an odd number of rows and a chain and a part of it along k.
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
  const auto a = units_of<E>(left), columns = units_of<E>(right);
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

// Sums of 298 products of up to 1: 1e-5 apart by rounding, 5 by an operand that lies elsewhere.
static bool agrees() {
  const std::vector<float> got = sample_product<Brain>(), want = sample_product<F32>();
  for (std::size_t i = 0; i < got.size(); ++i)
    if (!(std::abs(got[i] - want[i]) < 1e-3f)) return false;
  return true;
}

extern const entropy_kernels::Kernels kernels;
const entropy_kernels::Kernels kernels{EK_NAME, seconds, agrees, forward_any, backward_any};

}  // namespace EK_ISA
