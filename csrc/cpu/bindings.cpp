// The Python module _cpu: pointers and sizes become the structs of head.h.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "head.h"
#include "radix_histogram.h"
#include "ratio_loss.h"

namespace {

namespace py = pybind11;
using entropy_kernels::BackwardCall;
using entropy_kernels::Dtype;
using entropy_kernels::ForwardCall;
using entropy_kernels::ForwardRows;
using entropy_kernels::Head;
using entropy_kernels::Kernels;
using entropy_kernels::Rows;
using Pointer = std::uintptr_t;

template <class T>
T* as(Pointer p) {
  return reinterpret_cast<T*>(p);
}

void radix_histogram(Pointer values_ptr, Pointer mask_ptr, std::int64_t n, std::uint32_t prefix,
                     int shift, int bits, int prefix_bits, Pointer counts_ptr) {
  entropy_kernels::radix_histogram(as<const float>(values_ptr), as<const std::uint8_t>(mask_ptr), n,
                                   entropy_kernels::RadixDigit{prefix, prefix_bits, shift, bits},
                                   as<std::int64_t>(counts_ptr));
}

void ratio_loss(Pointer logprob_ptr, Pointer old_logprob_ptr, Pointer advantage_ptr,
                Pointer selected_ptr, Pointer weight_ptr, std::int64_t sequences,
                std::int64_t length, float low, float high, float dual, float log_ratio,
                int threads, Pointer loss_ptr, Pointer grad_ptr, Pointer sums_ptr,
                Pointer counts_ptr) {
  entropy_kernels::ratio_loss({as<const float>(logprob_ptr), as<const float>(old_logprob_ptr),
                               as<const float>(advantage_ptr), as<const std::uint8_t>(selected_ptr),
                               as<const float>(weight_ptr), sequences, length},
                              {low, high, dual, log_ratio}, threads,
                              {as<float>(loss_ptr), as<float>(grad_ptr), as<float>(sums_ptr),
                               as<std::int64_t>(counts_ptr)});
}

Head make_head(Pointer hidden_ptr, std::int64_t hidden_stride, Pointer weight_ptr,
               std::int64_t weight_stride, Pointer bias_ptr, Pointer temperature_ptr, float softcap,
               Pointer target_ptr, std::int64_t tokens, std::int64_t dim, std::int64_t vocabulary,
               int dtype, int threads, std::int64_t l2, std::int64_t last, Pointer logits_ptr) {
  return {as<const void>(hidden_ptr),
          hidden_stride,
          as<const void>(weight_ptr),
          weight_stride,
          as<const float>(bias_ptr),
          as<const float>(temperature_ptr),
          softcap,
          as<const std::int64_t>(target_ptr),
          tokens,
          dim,
          vocabulary,
          static_cast<Dtype>(dtype),
          threads,
          {l2, last},
          as<float>(logits_ptr)};
}

ForwardRows forward_rows(Pointer rows_ptr, Pointer statistics_ptr, const Head& head) {
  return {as<float>(rows_ptr), head.tokens, as<float>(statistics_ptr)};
}

Rows indexed(Pointer index_ptr, std::int64_t count) {
  return {as<const std::int64_t>(index_ptr), count};
}

// Runs pending signal handlers between blocks; one that raises, as Ctrl-C does, stops the kernel.
bool signal_raised() {
  py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

const Kernels& kernels(const std::string& name) {
  const Kernels* kernels = entropy_kernels::find_kernels(name.c_str());
  if (kernels == nullptr) throw py::value_error("this machine has no instruction set " + name);
  return *kernels;
}

template <class Run>
std::int64_t without_gil(Run run) {
  std::int64_t products;
  {
    py::gil_scoped_release release;
    products = run();
  }
  if (products < 0) throw py::error_already_set();
  return products;
}

std::int64_t linear_logprob_entropy(const Head& head, Pointer index_ptr, std::int64_t count,
                                    Pointer rows_ptr, Pointer statistics_ptr,
                                    const std::string& isa) {
  const Kernels& chosen = kernels(isa);
  const ForwardCall call{head, indexed(index_ptr, count),
                         forward_rows(rows_ptr, statistics_ptr, head)};
  return without_gil([&] { return chosen.forward(call, signal_raised); });
}

std::int64_t linear_logprob_entropy_backward(const Head& head, Pointer index_ptr,
                                             std::int64_t count, Pointer rows_ptr,
                                             Pointer grad_logprob_ptr, Pointer grad_entropy_ptr,
                                             Pointer grad_logsumexp_ptr, Pointer dhidden_ptr,
                                             Pointer dweight_ptr, int dweight_dtype,
                                             bool add_dweight, Pointer dbias_ptr,
                                             const std::string& isa) {
  const Kernels& chosen = kernels(isa);
  const BackwardCall call{head,
                          indexed(index_ptr, count),
                          forward_rows(rows_ptr, 0, head),
                          {as<const float>(grad_logprob_ptr), as<const float>(grad_entropy_ptr),
                           as<const float>(grad_logsumexp_ptr)},
                          {as<float>(dhidden_ptr), as<void>(dweight_ptr),
                           static_cast<Dtype>(dweight_dtype), add_dweight, as<float>(dbias_ptr)}};
  return without_gil([&] { return chosen.backward(call, signal_raised); });
}

std::int64_t pair_dots(Pointer left_ptr, std::int64_t left_stride, Pointer right_ptr,
                       std::int64_t right_stride, int dtype, Pointer left_row_ptr,
                       Pointer right_row_ptr, std::int64_t pairs, std::int64_t dim, int threads,
                       Pointer out_ptr, const std::string& isa) {
  const Kernels& chosen = kernels(isa);
  const auto type = static_cast<Dtype>(dtype);
  const entropy_kernels::PairDots call{{as<const void>(left_ptr), left_stride, type},
                                       {as<const void>(right_ptr), right_stride, type},
                                       as<const std::int64_t>(left_row_ptr),
                                       as<const std::int64_t>(right_row_ptr),
                                       pairs,
                                       dim,
                                       threads,
                                       as<float>(out_ptr)};
  return without_gil([&] { return chosen.pair_dots(call, signal_raised); });
}

std::int64_t pair_sums(Pointer scale_ptr, Pointer rows_ptr, std::int64_t rows_stride,
                       int rows_dtype, Pointer row_ptr, Pointer place_ptr, std::int64_t pairs,
                       std::int64_t dim, int threads, Pointer out_ptr, std::int64_t out_stride,
                       int out_dtype, bool add, const std::string& isa) {
  const Kernels& chosen = kernels(isa);
  const entropy_kernels::PairSums call{
      as<const float>(scale_ptr),
      {as<const void>(rows_ptr), rows_stride, static_cast<Dtype>(rows_dtype)},
      as<const std::int64_t>(row_ptr),
      as<const std::int64_t>(place_ptr),
      pairs,
      dim,
      threads,
      as<void>(out_ptr),
      out_stride,
      static_cast<Dtype>(out_dtype),
      add};
  return without_gil([&] { return chosen.pair_sums(call, signal_raised); });
}

void row_entropies(Pointer logits_ptr, std::int64_t stride, int dtype, Pointer temperature_ptr,
                   std::int64_t temperature_stride, std::int64_t rows, std::int64_t vocabulary,
                   int threads, Pointer out_ptr, const std::string& isa) {
  const Kernels& chosen = kernels(isa);
  const entropy_kernels::RowEntropies call{
      {as<const void>(logits_ptr), stride, static_cast<Dtype>(dtype)},
      as<const float>(temperature_ptr),
      temperature_stride,
      rows,
      vocabulary,
      threads,
      as<float>(out_ptr)};
  without_gil([&] { return chosen.row_entropies(call, signal_raised); });
}

py::dict caches() {
  const entropy_kernels::Caches sizes = entropy_kernels::machine_caches();
  return py::dict(py::arg("l2") = sizes.l2, py::arg("last") = sizes.last);
}

py::list instruction_sets(bool models) {
  py::list names;
  const Kernels* model = models ? entropy_kernels::model_kernels() : nullptr;
  if (model != nullptr) names.append(model->name);
  for (int i = 0; const Kernels* kernels = entropy_kernels::usable_kernels(i); ++i)
    names.append(kernels->name);
  return names;
}

bool agrees(const std::string& isa) { return kernels(isa).agrees(); }

double seconds(const std::string& isa, int dtype) {
  const Kernels& chosen = kernels(isa);
  double best = chosen.seconds(static_cast<Dtype>(dtype));
  for (int run = 1; run < 32; ++run)
    best = std::min(best, chosen.seconds(static_cast<Dtype>(dtype)));
  return best;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels over raw pointers; entropy_kernels._native checks what they are given.";
  m.attr("sources") = EK_SOURCES;
  m.attr("compiler") = EK_COMPILER;
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  m.def(
      "radix_histogram", &radix_histogram, py::call_guard<py::gil_scoped_release>(),
      py::arg("values_ptr"), py::arg("mask_ptr"), py::arg("n"), py::arg("prefix"), py::arg("shift"),
      py::arg("bits"), py::arg("prefix_bits"), py::arg("counts_ptr"),
      "Adds to counts[digit] the number of valid fp32 values of that digit. If mask_ptr is 0, all "
      "values are valid.");
  m.def("ratio_loss", &ratio_loss, py::call_guard<py::gil_scoped_release>(), py::kw_only(),
        py::arg("logprob_ptr"), py::arg("old_logprob_ptr"), py::arg("advantage_ptr"),
        py::arg("selected_ptr"), py::arg("weight_ptr"), py::arg("sequences"), py::arg("length"),
        py::arg("low"), py::arg("high"), py::arg("dual"), py::arg("log_ratio"), py::arg("threads"),
        py::arg("loss_ptr"), py::arg("grad_ptr"), py::arg("sums_ptr"), py::arg("counts_ptr"),
        "Writes the loss, its gradient [sequences * length], four sums and three counts.");
  py::class_<Head>(m, "Head", "A head and its tokens. Pointers may be 0 where head.h says nullptr.")
      .def(py::init(&make_head), py::kw_only(), py::arg("hidden_ptr"), py::arg("hidden_stride"),
           py::arg("weight_ptr"), py::arg("weight_stride"), py::arg("bias_ptr"),
           py::arg("temperature_ptr"), py::arg("softcap"), py::arg("target_ptr"), py::arg("tokens"),
           py::arg("dim"), py::arg("vocabulary"), py::arg("dtype"), py::arg("threads"),
           py::arg("l2"), py::arg("last"), py::arg("logits_ptr"));
  m.def(
      "linear_logprob_entropy", &linear_logprob_entropy, py::arg("head"), py::kw_only(),
      py::arg("index_ptr"), py::arg("count"), py::arg("rows_ptr"), py::arg("statistics_ptr"),
      py::arg("isa"),
      "Writes logprob, entropy, logsumexp, max and log_sum to rows_ptr, fp32 [5, T]. Writes "
      "varentropy, the largest probability, the sums of p^2 and of p^2 log p, the mean logit, and "
      "whether the target is the first of the largest logits to statistics_ptr, fp32 [6, T], "
      "unless it is 0. Returns the number of multiplications.");
  m.def("linear_logprob_entropy_backward", &linear_logprob_entropy_backward, py::arg("head"),
        py::kw_only(), py::arg("index_ptr"), py::arg("count"), py::arg("rows_ptr"),
        py::arg("grad_logprob_ptr"), py::arg("grad_entropy_ptr"), py::arg("grad_logsumexp_ptr"),
        py::arg("dhidden_ptr"), py::arg("dweight_ptr"), py::arg("dweight_dtype"),
        py::arg("add_dweight"), py::arg("dbias_ptr"), py::arg("isa"),
        "Writes the gradients of the rows at `index`, except those whose pointer is 0. dweight has "
        "dweight_dtype, and is added to if add_dweight. Returns the number of multiplications.");
  m.def("pair_dots", &pair_dots, py::kw_only(), py::arg("left_ptr"), py::arg("left_stride"),
        py::arg("right_ptr"), py::arg("right_stride"), py::arg("dtype"), py::arg("left_row_ptr"),
        py::arg("right_row_ptr"), py::arg("pairs"), py::arg("dim"), py::arg("threads"),
        py::arg("out_ptr"), py::arg("isa"),
        "Writes the dot product of each pair of rows. Returns the number of multiplications.");
  m.def("pair_sums", &pair_sums, py::kw_only(), py::arg("scale_ptr"), py::arg("rows_ptr"),
        py::arg("rows_stride"), py::arg("rows_dtype"), py::arg("row_ptr"), py::arg("place_ptr"),
        py::arg("pairs"), py::arg("dim"), py::arg("threads"), py::arg("out_ptr"),
        py::arg("out_stride"), py::arg("out_dtype"), py::arg("add"), py::arg("isa"),
        "Writes or adds the sum of scaled rows of each run of equal places. Returns the number of "
        "multiplications.");
  m.def("row_entropies", &row_entropies, py::kw_only(), py::arg("logits_ptr"), py::arg("stride"),
        py::arg("dtype"), py::arg("temperature_ptr"), py::arg("temperature_stride"),
        py::arg("rows"), py::arg("vocabulary"), py::arg("threads"), py::arg("out_ptr"),
        py::arg("isa"), "Writes the entropy of softmax(logits / temperature) of each row.");
  m.def("caches", &caches, "Bytes of the second-level cache and of the last level.");
  m.def("instruction_sets", &instruction_sets, py::arg("models") = false,
        "The sets that this machine can run, best first. With models, slow models of sets that it "
        "lacks come before them.");
  m.def("why_no_amx", &entropy_kernels::why_no_amx,
        "Why AMX is not used: empty if it can be, None if the processor has none.");
  m.def("agrees", &agrees, py::arg("isa"),
        "Whether products of bf16 are those of fp32, except for rounding.");
  m.def("seconds", &seconds, py::arg("isa"), py::arg("dtype"),
        "Seconds of a small product of inputs of that dtype, the best of 32; below a millisecond.");
}
