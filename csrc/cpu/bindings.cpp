#include <pybind11/pybind11.h>

#include <cstdint>

#include "radix_histogram.h"

namespace {

void radix_histogram(std::uintptr_t values_ptr, std::uintptr_t mask_ptr, std::int64_t n,
                     std::uint32_t prefix, int shift, int bits, int prefix_bits,
                     std::uintptr_t counts_ptr) {
  const entropy_kernels::RadixDigit digit{prefix, prefix_bits, shift, bits};
  entropy_kernels::radix_histogram(reinterpret_cast<const float*>(values_ptr),
                                   reinterpret_cast<const std::uint8_t*>(mask_ptr), n, digit,
                                   reinterpret_cast<std::int64_t*>(counts_ptr));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  namespace py = pybind11;
  m.doc() = "CPU kernels over raw pointers; entropy_kernels._native checks what they are given.";
  m.def("radix_histogram", &radix_histogram, py::call_guard<py::gil_scoped_release>(),
        py::arg("values_ptr"), py::arg("mask_ptr"), py::arg("n"), py::arg("prefix"),
        py::arg("shift"), py::arg("bits"), py::arg("prefix_bits"), py::arg("counts_ptr"),
        "counts[digit] += the number of valid fp32 values of that digit; mask_ptr 0: all valid.");
}
