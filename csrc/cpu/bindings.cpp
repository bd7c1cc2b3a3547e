#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "head.h"
#include "radix_histogram.h"
#include "ratio_loss.h"

namespace {

namespace py = pybind11;
using entropy_kernels::Dtype;
using entropy_kernels::Gradients;
using entropy_kernels::Head;
using entropy_kernels::Incoming;
using entropy_kernels::Kernels;
using entropy_kernels::Rows;
using entropy_kernels::Statistics;
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
                Pointer kept_ptr, Pointer weight_ptr, std::int64_t sequences, std::int64_t length,
                float low, float high, float dual, float log_ratio, int threads, Pointer loss_ptr,
                Pointer grad_ptr, Pointer sums_ptr, Pointer counts_ptr) {
  entropy_kernels::ratio_loss({as<const float>(logprob_ptr), as<const float>(old_logprob_ptr),
                               as<const float>(advantage_ptr), as<const std::uint8_t>(kept_ptr),
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

Statistics statistics(Pointer rows_ptr, Pointer moments_ptr, std::int64_t tokens) {
  float* rows = as<float>(rows_ptr);
  return {rows,
          rows + tokens,
          rows + 2 * tokens,
          rows + 3 * tokens,
          rows + 4 * tokens,
          as<float>(moments_ptr)};
}

// Ctrl-C between blocks: pending signal handlers run, and one that raises stops the kernel.
bool signal_raised() {
  py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

const Kernels& kernels(const std::string& name) {
  const Kernels* found = entropy_kernels::find_kernels(name.c_str());
  if (found == nullptr) throw py::value_error("this machine has no instruction set " + name);
  return *found;
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
                                    Pointer statistics_ptr, Pointer moments_ptr,
                                    const std::string& isa) {
  const Kernels& chosen = kernels(isa);
  return without_gil([&] {
    return chosen.forward(head, Rows{as<const std::int64_t>(index_ptr), count},
                          statistics(statistics_ptr, moments_ptr, head.tokens), signal_raised);
  });
}

std::int64_t linear_logprob_entropy_backward(const Head& head, Pointer index_ptr,
                                             std::int64_t count, Pointer statistics_ptr,
                                             Pointer grad_logprob_ptr, Pointer grad_entropy_ptr,
                                             Pointer grad_logsumexp_ptr, Pointer dhidden_ptr,
                                             Pointer dweight_ptr, int dweight_dtype,
                                             bool add_dweight, Pointer dbias_ptr,
                                             const std::string& isa) {
  const Kernels& chosen = kernels(isa);
  const Incoming incoming{as<const float>(grad_logprob_ptr), as<const float>(grad_entropy_ptr),
                          as<const float>(grad_logsumexp_ptr)};
  const Gradients out{as<float>(dhidden_ptr), as<void>(dweight_ptr),
                      static_cast<Dtype>(dweight_dtype), add_dweight, as<float>(dbias_ptr)};
  return without_gil([&] {
    return chosen.backward(head, Rows{as<const std::int64_t>(index_ptr), count},
                           statistics(statistics_ptr, 0, head.tokens), incoming, out,
                           signal_raised);
  });
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
  m.def("radix_histogram", &radix_histogram, py::call_guard<py::gil_scoped_release>(),
        py::arg("values_ptr"), py::arg("mask_ptr"), py::arg("n"), py::arg("prefix"),
        py::arg("shift"), py::arg("bits"), py::arg("prefix_bits"), py::arg("counts_ptr"),
        "counts[digit] += the number of valid fp32 values of that digit; mask_ptr 0: all valid.");
  m.def("ratio_loss", &ratio_loss, py::call_guard<py::gil_scoped_release>(), py::kw_only(),
        py::arg("logprob_ptr"), py::arg("old_logprob_ptr"), py::arg("advantage_ptr"),
        py::arg("kept_ptr"), py::arg("weight_ptr"), py::arg("sequences"), py::arg("length"),
        py::arg("low"), py::arg("high"), py::arg("dual"), py::arg("log_ratio"), py::arg("threads"),
        py::arg("loss_ptr"), py::arg("grad_ptr"), py::arg("sums_ptr"), py::arg("counts_ptr"),
        "Writes the loss, its gradient [sequences * length], four sums and three counts.");
  py::class_<Head>(m, "Head", "A head and its rows; pointers may be 0 where head.h says nullptr.")
      .def(py::init(&make_head), py::kw_only(), py::arg("hidden_ptr"), py::arg("hidden_stride"),
           py::arg("weight_ptr"), py::arg("weight_stride"), py::arg("bias_ptr"),
           py::arg("temperature_ptr"), py::arg("softcap"), py::arg("target_ptr"), py::arg("tokens"),
           py::arg("dim"), py::arg("vocabulary"), py::arg("dtype"), py::arg("threads"),
           py::arg("l2"), py::arg("last"), py::arg("logits_ptr"));
  m.def("linear_logprob_entropy", &linear_logprob_entropy, py::arg("head"), py::kw_only(),
        py::arg("index_ptr"), py::arg("count"), py::arg("statistics_ptr"), py::arg("moments_ptr"),
        py::arg("isa"),
        "Writes logprob, entropy, logsumexp, max and log_sum: fp32 [5, T]; and varentropy, the "
        "largest probability, and the sums of p^2 and p^2 log p: fp32 [4, T], unless moments_ptr "
        "is 0. Returns the multiplications done.");
  m.def(
      "linear_logprob_entropy_backward", &linear_logprob_entropy_backward, py::arg("head"),
      py::kw_only(), py::arg("index_ptr"), py::arg("count"), py::arg("statistics_ptr"),
      py::arg("grad_logprob_ptr"), py::arg("grad_entropy_ptr"), py::arg("grad_logsumexp_ptr"),
      py::arg("dhidden_ptr"), py::arg("dweight_ptr"), py::arg("dweight_dtype"),
      py::arg("add_dweight"), py::arg("dbias_ptr"), py::arg("isa"),
      "Gradients of the rows at `index`; a pointer of 0 asks for nothing. The weight's is written "
      "as `dweight_dtype`, or added to what is there. Returns the multiplications done.");
  m.def(
      "caches",
      [] {
        const entropy_kernels::Caches found = entropy_kernels::machine_caches();
        return py::dict(py::arg("l2") = found.l2, py::arg("last") = found.last);
      },
      "Bytes of the second-level cache and of the last level.");
  m.def(
      "instruction_sets",
      [](bool models) {
        py::list names;
        const Kernels* model = models ? entropy_kernels::model_kernels() : nullptr;
        if (model != nullptr) names.append(model->name);
        for (int i = 0; const Kernels* kernels = entropy_kernels::usable_kernels(i); ++i)
          names.append(kernels->name);
        return names;
      },
      py::arg("models") = false,
      "What this machine can run, best first; models of what it lacks, slow, come before.");
  m.def(
      "agrees", [](const std::string& isa) { return kernels(isa).agrees(); }, py::arg("isa"),
      "Whether a product of bf16 is that of fp32, but for rounding.");
  m.def(
      "why_no_amx",
      []() -> py::object {
        const char* why = entropy_kernels::why_no_amx();
        return why == nullptr ? py::object(py::none()) : py::object(py::str(why));
      },
      "Why AMX is not used; empty where it can be, None where the processor has none.");
  m.def(
      "seconds",
      [](const std::string& isa, int dtype) {
        const Kernels& chosen = kernels(isa);
        double best = chosen.seconds(static_cast<Dtype>(dtype));
        for (int run = 1; run < 32; ++run)
          best = std::min(best, chosen.seconds(static_cast<Dtype>(dtype)));
        return best;
      },
      py::arg("isa"), py::arg("dtype"),
      "Seconds of a small product of inputs of a dtype, the best of many; less than a "
      "millisecond.");
}
