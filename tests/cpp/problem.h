// Heads to test the kernels on, and what the kernels compute. T tokens, R of them worked on, D
// hidden, V vocabulary.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "head.h"

using entropy_kernels::Dtype;
using entropy_kernels::Kernels;

struct Options {
  bool bias = false, temperature = false;
  float softcap = 0;
  bool some_rows = false;                 // three in four of the tokens
  bool entropy = true, logsumexp = true;  // gradients that arrive beside logprob's
};

struct Problem {
  std::int64_t tokens, dim, vocabulary;
  Dtype dtype;
  std::vector<float> hidden, weight;  // [T, D], [V, D], as the dtype holds them
  std::vector<float> bias, temperature;
  float softcap;
  std::vector<std::int64_t> target, index;
  bool all_rows;
  std::vector<float> grad_logprob, grad_entropy, grad_logsumexp;  // [R]

  // The rows range from uniform ones to ones with nearly all mass on one column.
  Problem(std::int64_t tokens, std::int64_t dim, std::int64_t vocabulary, Dtype dtype,
          const Options& options);
};

// What forward and backward write, as floats. What forward writes is kUntouched for tokens that are
// not in `index`.
struct Outcome {
  std::vector<float> rows, statistics;         // [5, T], [6, T]
  std::vector<float> dhidden, dweight, dbias;  // [R, D], [V, D], [V]
  std::int64_t forward_products, backward_products;

  bool operator==(const Outcome& other) const;  // compares bits
  bool same_gradients(const Outcome& other) const;
};

constexpr float kUntouched = 12345.0f;

Outcome run(const Kernels& kernels, const Problem& problem, int threads, bool store_logits);

// A generator with the same numbers on every platform.
struct Random {
  std::mt19937 engine{1};
  double uniform() { return (engine() + 0.5) / 4294967296.0; }
  double normal() {
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }
};

std::string name_of(Dtype dtype);
float rounded(float x, Dtype dtype);  // to nearest even
float decode(std::uint16_t bits, Dtype dtype);
// Rows of D values in the dtype's bytes, `stride` apart.
std::vector<char> encoded(const std::vector<float>& values, std::int64_t dim, std::int64_t stride,
                          Dtype dtype);
