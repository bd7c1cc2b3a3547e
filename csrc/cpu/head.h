#pragma once

#include <cstdint>

#include "caches.h"

namespace entropy_kernels {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

// What turns hidden states into logits: z = softcap * tanh((h W^T + b) / softcap), and all that is
// given of each token. T tokens, D hidden, V vocabulary; rows of hidden and weight are contiguous,
// their strides are in elements.
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
  float* logits;  // h W^T + b of all T tokens, in the tiles of rows.h: written by forward, read by
                  // backward; or nullptr
};

// The tokens to work on.
struct Rows {
  const std::int64_t* index;  // [R], or nullptr for 0, 1, ..., R - 1
  std::int64_t count;         // R

  std::int64_t operator[](std::int64_t i) const { return index == nullptr ? i : index[i]; }
};

// What forward finds of each token, all [T].
struct Statistics {
  float *logprob, *entropy, *logsumexp, *max, *log_sum;
  // [4, T]: varentropy, the largest p, sum of p^2, sum of p^2 log p; or nullptr
  float* moments;
};

// What arrives at the R rows of backward, each [R] or nullptr.
struct Incoming {
  const float *logprob, *entropy, *logsumexp;
};

// What backward is asked for; nullptr for what is not wanted.
struct Gradients {
  float* hidden;       // [R, D]
  void* weight;        // [V, D], contiguous
  Dtype weight_dtype;  // of `weight`
  bool add_weight;     // to what `weight` holds; false: it holds nothing yet
  float* bias;         // [V]
};

// Asked between blocks by the calling thread; true ends the work, outputs are then undefined.
using Stop = bool (*)();

// The kernels of one instruction set. Each returns the multiplications it has done, or -1 if it was
// stopped.
struct Kernels {
  const char* name;
  double (*seconds)(Dtype);  // what a small product of inputs of that dtype takes
  bool (*agrees)();          // whether products of bf16 are those of fp32, but for rounding
  std::int64_t (*forward)(const Head&, const Rows&, const Statistics&, Stop);
  std::int64_t (*backward)(const Head&, const Rows&, const Statistics&, const Incoming&,
                           const Gradients&, Stop);
};

// What this machine can run, best first: the `i`-th (nullptr beyond the last), and the one called
// `name` (nullptr if it cannot). The one that models AMX is found by its name alone.
const Kernels* usable_kernels(int i);
const Kernels* model_kernels();
const Kernels* find_kernels(const char* name);

// Why products do not run on the tiles of AMX; empty where they can, nullptr where the processor
// has none.
const char* why_no_amx();

}  // namespace entropy_kernels
