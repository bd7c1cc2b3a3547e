// What the CUDA kernels are given, and the host functions that launch them: raw pointers, sizes,
// and the stream. Nothing here knows torch or Python, and no launch waits for the GPU.
//
// T tokens, C compact rows, D hidden, V vocabulary, S vocabulary splits, B sequences, L their
// length.
#pragma once
#include <cstdint>

namespace ek {

using Stream = void*;  // a cudaStream_t

// The head's product and what its logits pass before they are summed. Rows of hidden and weight are
// bf16, dense and at addresses divisible by 16; products are summed in fp32.
struct Head {
  void const* hidden;  // [T, D]
  int64_t stride_hidden;
  void const* weight;  // [V, D]
  int64_t stride_weight;
  void const* bias;            // bf16 [V], or null
  float const* temperature;    // [T], or null for 1
  int64_t stride_temperature;  // 0 where all rows share one
  float softcap;               // z = softcap tanh(z / softcap); 0 leaves z as it is
  int rows;                    // T, or C
  int depth;                   // D
  int vocabulary;              // V
};

// Which kernel of the product runs: architecture 80, 90 or 100, and the block of one tile.
struct Tile {
  int architecture;
  int rows;
  int columns;
  int depth;
};

// The sums of each row over each split, as the Triton kernels have them: fields m, n, s and u, with
// statistics also w, q and r. Rows come in the order of Head; those past *number are not written.
struct Forward {
  float* partials;        // [4 or 7, S, T]
  float* target_logit;    // [T], with bias, capped
  int64_t const* target;  // [T]
  int const* index;       // [T], the row of `logits` for each row
  int const* number;      // [1], how many rows there are
  float* logits;          // [T, V], without bias and uncapped; or null
  bool statistics;
  int splits;  // S, as forward_splits says
};

// dz of columns [start, stop) for compact rows, rounded once from fp32 to bf16.
struct Dlogits {
  float const* fields;    // [6, C]: maximum, 1 / temperature, log sum; the gradients of logprob and
                          // entropy, and rest = g_logsumexp - g_entropy H, all over the temperature
  int64_t const* target;  // [C], -1 beyond the rows
  int const* first;       // [1], rows before it are left out; or null
  int const* number;      // [1], how many rows there are
  void* dz;               // bf16 [C, stride_dz], columns from `start` on
  int64_t stride_dz;
  float* bias_partials;  // fp32 [ceil(C / kBiasRows), stride_dz], or null
  int start;
  int stop;
  bool has_entropy;  // whether any gradient of the entropy is given
};
constexpr int kBiasRows = 16;  // rows whose dz one partial of the bias's gradient sums

// Results of every row from its partials, fp32 [T]; zeros where the target is ignored, NaN where a
// row has no answer.
struct Merge {
  float const* partials;      // [4 or 7, S, T]
  float const* target_logit;  // [T]
  int const* slot;            // [T], where partials have each row; or null for its own place
  int64_t const* target;      // [T]
  float const* temperature;   // [T], or null for 1
  int64_t stride_temperature;
  float* logprob;
  float* entropy;
  float* logsumexp;
  float* max;
  float* log_sum;
  float* statistics;  // [4, T], or null
  int rows;           // T
  int vocabulary;     // V
  int splits;         // S
  int64_t ignore_index;
};

// The clipped policy loss over B x L tokens; see `_torch/ratio_loss.py`.
struct RatioLoss {
  float const* logprob;
  float const* old_logprob;
  float const* advantage;
  uint8_t const* selected;
  float const* weight;  // [B]
  float* grad;
  double* partials;  // [8, kLossBlocks]
  float* loss;       // [1]
  float* sums;       // [4]
  int64_t* counts;   // [3]
  int64_t tokens;    // B L
  int64_t length;    // L
  double clip_low;
  double clip_high;
  float dual_clip;  // 0: none
  float log_ratio_bound;
};
constexpr int kLossBlocks = 1024;

// Valid values of a selection: fp32 [N], and which are valid, [N], or null for all.
struct Values {
  float const* value;
  uint8_t const* mask;
  int64_t count;
};

// The k = max(1, ceil(share n)) largest of n valid values, in one launch of one block; fewer
// launches than a digit at a time, for at most kOneBlock values.
struct Top {
  float* threshold;   // [1], the k-th largest; +inf where nothing is valid
  int64_t* quota;     // [1], how many of those equal to it belong to the k largest
  int64_t* equal;     // [1], how many are equal to it
  uint8_t* selected;  // [N], the k largest, of equal ones the first; or null
  int* rows;          // [N], where these are, ascending; or null
  int* number;        // [1], how many of `rows` are written; or null
};
constexpr int64_t kOneBlock = 1 << 17;

// Each throws std::runtime_error, with its own name, the error's and the sizes, where CUDA or
// CUTLASS refuses; nothing was launched then.
int forward_splits(Tile const&, int vocabulary);
void forward(Tile const&, Head const&, Forward const&, int processors, Stream);
void dlogits(Tile const&, Head const&, Dlogits const&, int processors, Stream);
void merge(Merge const&, Stream);
void ratio_loss(RatioLoss const&, Stream);
void top(Values const&, double share, Top const&, Stream);
// One digit at a time, over any number of values: see `_radix.py`. radix_histogram adds to
// `counts`.
void radix_histogram(Values const&, int64_t const* prefix, int shift, int bits, int prefix_bits,
                     int64_t* counts, Stream);
void radix_pick(int64_t const* counts, int64_t const* local, int64_t const* prefix,
                int64_t const* remaining, double share, int shift, int bits, int64_t* new_prefix,
                int64_t* new_remaining, int64_t* equal, float* value, Stream);
void select_largest(Values const&, float const* threshold, int64_t const* quota, int64_t* counts,
                    uint8_t* selected, Stream);
constexpr int kSelectBlocks = 1024;  // numbers in `counts` of select_largest

}  // namespace ek
