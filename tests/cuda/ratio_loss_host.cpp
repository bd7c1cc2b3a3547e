// Losses of a file of cases: INPUT OUTPUT SEED.
#include <cmath>
#include <string>

#include "answers.h"
#include "ratio_loss.cu"

int main(int, char** arguments) {
  std::FILE* const in = std::fopen(arguments[1], "rb");
  std::FILE* const out = std::fopen(arguments[2], "wb");
  simt::seed = std::stoul(arguments[3]);
  for (;;) {
    auto const sizes = file::read<int64_t>(in, 2);
    int64_t const sequences = sizes[0], length = sizes[1], tokens = sequences * length;
    auto const bounds = file::read<double>(in, 4);
    auto const logprob = file::read<float>(in, tokens), old = file::read<float>(in, tokens);
    auto const advantage = file::read<float>(in, tokens);
    auto const selected = file::read<uint8_t>(in, tokens);
    auto const weight = file::read<float>(in, sequences);
    std::vector<float> grad(tokens, NAN), loss(1, NAN), sums(4, NAN);
    std::vector<double> partials(8 * ek::kLossBlocks, NAN);
    std::vector<int64_t> counts(3, -1);
    ek::RatioLoss a = {};
    a.logprob = logprob.data();
    a.old_logprob = old.data();
    a.advantage = advantage.data();
    a.selected = selected.data();
    a.weight = weight.data();
    a.grad = grad.data();
    a.partials = partials.data();
    a.loss = loss.data();
    a.sums = sums.data();
    a.counts = counts.data();
    a.tokens = tokens;
    a.length = length;
    a.clip_low = bounds[0];
    a.clip_high = bounds[1];
    a.dual_clip = static_cast<float>(bounds[2]);
    a.log_ratio_bound = static_cast<float>(bounds[3]);
    ek::ratio_loss(a, nullptr);
    file::write(out, loss);
    file::write(out, grad);
    file::write(out, sums);
    file::write(out, counts);
  }
}
