// What the kernels are called with, and which kernels this machine can run.
#pragma once

#include <cstdint>

#include "caches.h"

namespace entropy_kernels {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

// A language model's head, z = softcap * tanh((h W^T + b) / softcap), and its tokens. T tokens, D
// hidden, V vocabulary. Rows of hidden and weight are contiguous; strides are in elements.
struct Head {
  const void* hidden;  // [T, D]
  std::int64_t hidden_stride;
  const void* weight;  // [V, D]
  std::int64_t weight_stride;
  const float* bias;           // [V] or nullptr
  const float* temperature;    // [T], or nullptr for 1
  float softcap;               // 0 for none
  const std::int64_t* target;  // [T]
  std::int64_t tokens, dim, vocabulary;
  Dtype dtype;
  int threads;
  Caches caches;
  // h W^T + b of all T tokens in the order of stored_tile, or nullptr. Forward writes it, backward
  // reads it.
  float* logits;
};

// The tokens to work on.
struct Rows {
  const std::int64_t* index;  // [R], or nullptr for 0, 1, ..., R - 1
  std::int64_t count;         // R

  std::int64_t operator[](std::int64_t i) const { return index == nullptr ? i : index[i]; }
};

// What forward computes per token.
struct ForwardRows {
  float *logprob, *entropy, *logsumexp, *max, *log_sum;  // [T] each
  // [6, T]: varentropy, the largest p, sum of p^2, sum of p^2 log p, the mean logit, and 1 where
  // the target is the first of the largest logits, else 0; or nullptr
  float* statistics;

  // `rows` [5, T] holds the five one after the other.
  ForwardRows(float* rows, std::int64_t tokens, float* statistics)
      : logprob(rows), entropy(rows + tokens), logsumexp(rows + 2 * tokens), max(rows + 3 * tokens),
        log_sum(rows + 4 * tokens), statistics(statistics) {}
};

// The gradients that arrive at the R rows of backward, [R] each; nullptr for zeros.
struct Incoming {
  const float *logprob, *entropy, *logsumexp;
};

// The gradients that backward writes; nullptr for what is not wanted.
struct Gradients {
  float* hidden;       // [R, D]
  void* weight;        // [V, D], contiguous
  Dtype weight_dtype;  // of `weight`
  bool add_weight;     // true adds to what `weight` holds, false overwrites it
  float* bias;         // [V]
};

struct ForwardCall {
  Head head;
  Rows rows;
  ForwardRows out;
};

struct BackwardCall {
  Head head;
  Rows rows;
  ForwardRows saved;  // as forward left it; `statistics` is not read
  Incoming in;
  Gradients out;
};

// Rows of any dtype. Values of a row are contiguous; the stride is in elements.
struct Matrix {
  const void* data;
  std::int64_t stride;
  Dtype dtype;
};

// P products of a row of `left` and a row of `right`, both of one dtype:
//   out[n] = left[left_row[n]] . right[right_row[n]]
struct PairDots {
  Matrix left, right;
  const std::int64_t *left_row, *right_row;  // [P] each
  std::int64_t pairs, dim;
  int threads;
  float* out;  // [P]
};

// Sums of scaled rows over each run of equal places, which do not fall:
//   out[place] = sum of scale[n] * rows[row[n]] over the run, or += if `add`
struct PairSums {
  const float* scale;  // [P]; rows of pairs with 0 are not read
  Matrix rows;
  const std::int64_t *row, *place;  // [P] each
  std::int64_t pairs, dim;
  int threads;
  void* out;  // a run whose scales are all 0 leaves its row as it is
  std::int64_t out_stride;
  Dtype out_dtype;
  bool add;
};

// The entropy of softmax(logits / temperature) per row, R rows of V logits.
struct RowEntropies {
  Matrix logits;
  const float* temperature;         // [R], [1] or nullptr for 1
  std::int64_t temperature_stride;  // 1, or 0 for one temperature
  std::int64_t rows, vocabulary;
  int threads;
  float* out;  // [R]
};

// The calling thread asks this between blocks. true ends the work; outputs are then undefined.
using Stop = bool (*)();

// The kernels of one instruction set. Those that take a Stop return how many multiplications their
// products have done, or -1 if they were stopped.
struct Kernels {
  const char* name;
  double (*seconds)(Dtype);  // the time of a small product of inputs of that dtype
  bool (*agrees)();          // whether products of bf16 are those of fp32, except for rounding
  std::int64_t (*forward)(const ForwardCall&, Stop);
  std::int64_t (*backward)(const BackwardCall&, Stop);
  std::int64_t (*pair_dots)(const PairDots&, Stop);
  std::int64_t (*pair_sums)(const PairSums&, Stop);
  std::int64_t (*row_entropies)(const RowEntropies&, Stop);
};

// The `i`-th of the sets that this machine can run, best first; nullptr beyond the last.
const Kernels* usable_kernels(int i);
// The set that models AMX in plain C++; nullptr if this machine cannot run it. usable_kernels does
// not list it.
const Kernels* model_kernels();
// The set called `name`, the model included; nullptr if this machine cannot run it.
const Kernels* find_kernels(const char* name);

// Why products do not run on AMX's tiles: empty if they can, nullptr if the processor has none.
const char* why_no_amx();

}  // namespace entropy_kernels
