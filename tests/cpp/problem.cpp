#include "problem.h"

#include <cmath>
#include <cstring>

#include "bits.h"

namespace {

bool never() { return false; }

// Rounds to `bits` significant bits, of which the last is worth at least `smallest`.
double nearest(double x, int bits, double smallest) {
  int exponent;
  std::frexp(x, &exponent);
  const double step = std::fmax(std::ldexp(1.0, exponent - bits), smallest);
  return x == 0 || !std::isfinite(x) ? x : std::nearbyint(x / step) * step;
}

std::uint16_t encode(float x, Dtype dtype) {
  // Values of the dtype lose nothing, and NaNs are quiet.
  if (dtype == Dtype::bf16) return std::uint16_t(bits_as<std::uint32_t>(x) >> 16);
  const std::uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (x != x) return 0x7e00;
  if (std::isinf(x)) return std::uint16_t(sign | 0x7c00);
  int exponent;
  const double part = std::frexp(std::fabs(x), &exponent);  // in [.5, 1)
  if (x == 0 || exponent < -13) return std::uint16_t(sign | int(std::ldexp(std::fabs(x), 24)));
  return std::uint16_t(sign | ((exponent + 14) << 10) | (int(std::ldexp(part, 11)) - 1024));
}

const float* given(const std::vector<float>& values) {
  return values.empty() ? nullptr : values.data();
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * 4) == 0;
}

}  // namespace

std::string name_of(Dtype dtype) {
  return dtype == Dtype::f32 ? "fp32" : dtype == Dtype::bf16 ? "bf16" : "fp16";
}

float rounded(float x, Dtype dtype) {
  if (dtype == Dtype::f32) return x;
  return float(dtype == Dtype::bf16 ? nearest(x, 8, 0x1p-133) : nearest(x, 11, 0x1p-24));
}

float decode(std::uint16_t bits, Dtype dtype) {
  if (dtype == Dtype::bf16) return bits_as<float>(std::uint32_t{bits} << 16);
  const int exponent = (bits >> 10) & 31, part = bits & 1023;
  double x = exponent == 0 ? std::ldexp(part, -24) : std::ldexp(1024 + part, exponent - 25);
  if (exponent == 31) x = part != 0 ? NAN : INFINITY;
  return float((bits & 0x8000) != 0 ? -x : x);
}

std::vector<char> encoded(const std::vector<float>& values, std::int64_t dim, std::int64_t stride,
                          Dtype dtype) {
  const std::int64_t rows = std::int64_t(values.size()) / dim, size = dtype == Dtype::f32 ? 4 : 2;
  std::vector<char> out(rows * stride * size);
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t d = 0; d < dim; ++d) {
      const float x = values[r * dim + d];
      const std::uint16_t half = dtype == Dtype::f32 ? 0 : encode(x, dtype);
      const void* from = dtype == Dtype::f32 ? static_cast<const void*>(&x) : &half;
      std::memcpy(out.data() + (r * stride + d) * size, from, size);
    }
  return out;
}

Problem::Problem(std::int64_t tokens, std::int64_t dim, std::int64_t vocabulary, Dtype dtype,
                 const Options& options)
    : tokens(tokens), dim(dim), vocabulary(vocabulary), dtype(dtype), softcap(options.softcap),
      all_rows(!options.some_rows) {
  Random random;
  for (std::int64_t i = 0; i < vocabulary * dim; ++i)
    weight.push_back(rounded(float(random.normal() / std::sqrt(double(dim))), dtype));
  for (std::int64_t t = 0; t < tokens; ++t) {
    target.push_back(std::int64_t(random.uniform() * double(vocabulary)));
    const std::int64_t top = t % 3 == 0 ? target[t] : std::int64_t(random.uniform() * vocabulary);
    const double scale = 25 * random.uniform();
    for (std::int64_t d = 0; d < dim; ++d) {
      const double x = scale * weight[top * dim + d] + random.normal();
      hidden.push_back(rounded(float(x), dtype));
    }
    if (options.temperature) temperature.push_back(float(0.5 + random.uniform()));
    if (options.some_rows && t % 4 == 1) continue;
    index.push_back(t);
    grad_logprob.push_back(float(random.normal()));
    if (options.entropy) grad_entropy.push_back(float(random.normal()));
    if (options.logsumexp) grad_logsumexp.push_back(float(random.normal()));
  }
  for (std::int64_t j = 0; options.bias && j < vocabulary; ++j)
    bias.push_back(float(random.normal()));
}

bool Outcome::operator==(const Outcome& other) const {
  return same_bits(rows, other.rows) && same_bits(statistics, other.statistics) &&
         same_gradients(other);
}

bool Outcome::same_gradients(const Outcome& other) const {
  return same_bits(dhidden, other.dhidden) && same_bits(dweight, other.dweight) &&
         same_bits(dbias, other.dbias);
}

Outcome run(const Kernels& kernels, const Problem& p, int threads, bool store_logits) {
  const std::int64_t hidden_stride = p.dim + 3, weight_stride = p.dim % 2 == 0 ? p.dim : p.dim + 2;
  const auto hidden = encoded(p.hidden, p.dim, hidden_stride, p.dtype);
  const auto weight = encoded(p.weight, p.dim, weight_stride, p.dtype);
  std::vector<float> logits(store_logits ? (p.tokens + 63) / 64 * 64 * p.vocabulary : 0);
  const entropy_kernels::Head head{hidden.data(),
                                   hidden_stride,
                                   weight.data(),
                                   weight_stride,
                                   given(p.bias),
                                   given(p.temperature),
                                   p.softcap,
                                   p.target.data(),
                                   p.tokens,
                                   p.dim,
                                   p.vocabulary,
                                   p.dtype,
                                   threads,
                                   entropy_kernels::machine_caches(),
                                   store_logits ? logits.data() : nullptr};
  const std::int64_t count = std::int64_t(p.index.size());
  const entropy_kernels::Rows rows{p.all_rows ? nullptr : p.index.data(), count};
  Outcome out;
  out.rows.assign(5 * p.tokens, kUntouched);
  out.statistics.assign(6 * p.tokens, kUntouched);
  const entropy_kernels::ForwardRows computed(out.rows.data(), p.tokens, out.statistics.data());
  // With stored logits forward works on all tokens.
  const entropy_kernels::Rows all{nullptr, p.tokens};
  out.forward_products = kernels.forward({head, store_logits ? all : rows, computed}, never);
  out.dhidden.assign(count * p.dim, kUntouched);
  out.dbias.assign(p.vocabulary, kUntouched);
  std::vector<float> wide(p.vocabulary * p.dim, kUntouched);
  std::vector<std::uint16_t> half(wide.size(), 0x4d4d);
  void* dweight = p.dtype == Dtype::f32 ? static_cast<void*>(wide.data()) : half.data();
  const entropy_kernels::BackwardCall call{
      head,
      rows,
      computed,
      {given(p.grad_logprob), given(p.grad_entropy), given(p.grad_logsumexp)},
      {out.dhidden.data(), dweight, p.dtype, false, out.dbias.data()}};
  out.backward_products = kernels.backward(call, never);
  for (std::size_t i = 0; p.dtype != Dtype::f32 && i < half.size(); ++i)
    wide[i] = decode(half[i], p.dtype);
  out.dweight = wide;
  return out;
}
