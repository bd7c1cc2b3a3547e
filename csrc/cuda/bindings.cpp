// The Python module _cuda: keywords become the structs of launch.h. A field or an argument has its
// name there; a pointer is an integer, and 0 is null.
#include <cuda_runtime_api.h>
#include <cutlass/version.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <type_traits>

#include "error.h"
#include "launch.h"

namespace {

namespace py = pybind11;

// What Python gives for a T.
template <class T>
using Given = std::conditional_t<std::is_pointer_v<T>, std::uintptr_t, T>;

template <class T>
T as(Given<T> value) {
  if constexpr (std::is_pointer_v<T>)
    return reinterpret_cast<T>(value);
  else
    return value;
}

template <class Struct, class Member>
struct Field {
  char const* name;
  Member Struct::* member;
};

// A class whose constructor takes every field, by its name.
template <class Struct, class... Members>
void bind_struct(py::module_& m, char const* name, Field<Struct, Members>... fields) {
  py::class_<Struct>(m, name).def(py::init([fields...](Given<Members>... values) {
                                    Struct made{};
                                    ((made.*fields.member = as<Members>(values)), ...);
                                    return made;
                                  }),
                                  py::kw_only(), py::arg(fields.name)...);
}

// A function of launch.h, which takes every argument by its name.
template <class Result, class... Arguments, class... Names>
void bind_function(py::module_& m, char const* name, Result (*function)(Arguments...),
                   Names... names) {
  m.def(
      name, [function](Given<Arguments>... values) { return function(as<Arguments>(values)...); },
      py::call_guard<py::gil_scoped_release>(), py::kw_only(), py::arg(names)...);
}

#define FIELD(Struct, field) \
  Field<ek::Struct, decltype(ek::Struct::field)> { #field, &ek::Struct::field }

void bind_head(py::module_& m) {
  bind_struct(m, "Tile", FIELD(Tile, architecture), FIELD(Tile, rows), FIELD(Tile, columns),
              FIELD(Tile, depth));
  bind_struct(m, "Head", FIELD(Head, hidden), FIELD(Head, stride_hidden), FIELD(Head, weight),
              FIELD(Head, stride_weight), FIELD(Head, bias), FIELD(Head, temperature),
              FIELD(Head, stride_temperature), FIELD(Head, softcap), FIELD(Head, rows),
              FIELD(Head, depth), FIELD(Head, vocabulary));
  bind_struct(m, "Forward", FIELD(Forward, partials), FIELD(Forward, target_logit),
              FIELD(Forward, target), FIELD(Forward, index), FIELD(Forward, number),
              FIELD(Forward, logits), FIELD(Forward, statistics), FIELD(Forward, splits));
  bind_struct(m, "Dlogits", FIELD(Dlogits, fields), FIELD(Dlogits, target), FIELD(Dlogits, first),
              FIELD(Dlogits, number), FIELD(Dlogits, dz), FIELD(Dlogits, stride_dz),
              FIELD(Dlogits, bias_partials), FIELD(Dlogits, start), FIELD(Dlogits, stop),
              FIELD(Dlogits, has_entropy));
  bind_struct(m, "Merge", FIELD(Merge, partials), FIELD(Merge, target_logit), FIELD(Merge, slot),
              FIELD(Merge, target), FIELD(Merge, temperature), FIELD(Merge, stride_temperature),
              FIELD(Merge, logprob), FIELD(Merge, entropy), FIELD(Merge, logsumexp),
              FIELD(Merge, max), FIELD(Merge, log_sum), FIELD(Merge, statistics),
              FIELD(Merge, rows), FIELD(Merge, vocabulary), FIELD(Merge, splits),
              FIELD(Merge, ignore_index));
  bind_function(m, "forward_splits", &ek::forward_splits, "tile", "vocabulary");
  bind_function(m, "forward", &ek::forward, "tile", "head", "forward", "processors", "stream");
  bind_function(m, "dlogits", &ek::dlogits, "tile", "head", "dlogits", "processors", "stream");
  bind_function(m, "merge", &ek::merge, "merge", "stream");
}

void bind_tokens(py::module_& m) {
  bind_struct(m, "RatioLoss", FIELD(RatioLoss, logprob), FIELD(RatioLoss, old_logprob),
              FIELD(RatioLoss, advantage), FIELD(RatioLoss, selected), FIELD(RatioLoss, weight),
              FIELD(RatioLoss, grad), FIELD(RatioLoss, partials), FIELD(RatioLoss, loss),
              FIELD(RatioLoss, sums), FIELD(RatioLoss, counts), FIELD(RatioLoss, tokens),
              FIELD(RatioLoss, length), FIELD(RatioLoss, clip_low), FIELD(RatioLoss, clip_high),
              FIELD(RatioLoss, dual_clip), FIELD(RatioLoss, log_ratio_bound));
  bind_struct(m, "Values", FIELD(Values, value), FIELD(Values, mask), FIELD(Values, count));
  bind_struct(m, "Top", FIELD(Top, threshold), FIELD(Top, quota), FIELD(Top, equal),
              FIELD(Top, selected), FIELD(Top, rows), FIELD(Top, number));
  bind_function(m, "ratio_loss", &ek::ratio_loss, "loss", "stream");
  bind_function(m, "top", &ek::top, "values", "share", "top", "stream");
  bind_function(m, "radix_histogram", &ek::radix_histogram, "values", "prefix", "shift", "bits",
                "prefix_bits", "counts", "stream");
  bind_function(m, "radix_pick", &ek::radix_pick, "counts", "local", "prefix", "remaining", "share",
                "shift", "bits", "new_prefix", "new_remaining", "equal", "value", "stream");
  bind_function(m, "select_largest", &ek::select_largest, "values", "threshold", "quota", "counts",
                "selected", "stream");
  m.attr("bias_rows") = ek::kBiasRows;
  m.attr("loss_blocks") = ek::kLossBlocks;
  m.attr("one_block") = ek::kOneBlock;
  m.attr("select_blocks") = ek::kSelectBlocks;
}

int runtime_version() {
  int version = 0;
  ek::check(cudaRuntimeGetVersion(&version), "cudaRuntimeGetVersion");
  return version;
}

int driver_version() {
  int version = 0;
  ek::check(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
  return version;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels over raw pointers; entropy_kernels._cuda_kernels checks what they get.";
  m.attr("sources") = EK_SOURCES;
  m.attr("compiler") = EK_COMPILER;
  m.attr("architectures") = EK_ARCHITECTURES;
  m.attr("cutlass") = std::to_string(CUTLASS_MAJOR) + "." + std::to_string(CUTLASS_MINOR) + "." +
                      std::to_string(CUTLASS_PATCH);
  m.def("runtime_version", &runtime_version,
        "The CUDA that this was built with, as 13000 for 13.0.");
  m.def("driver_version", &driver_version, "The CUDA that the driver runs; 0 without a driver.");
  bind_head(m);
  bind_tokens(m);
}
