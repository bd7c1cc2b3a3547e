// Results of rows from a file of cases: INPUT OUTPUT SEED.
#include <string>

#include "answers.h"
#include "merge.cu"

int main(int, char** arguments) {
  std::FILE* const in = std::fopen(arguments[1], "rb");
  std::FILE* const out = std::fopen(arguments[2], "wb");
  simt::seed = std::stoul(arguments[3]);
  for (;;) {
    // Rows, vocabulary, splits, ignore_index; numbers in slot and in temperature, and its stride;
    // statistics.
    auto const sizes = file::read<int64_t>(in, 8);
    int64_t const rows = sizes[0], fields = sizes[7] ? 7 : 4;
    auto const partials = file::read<float>(in, fields * sizes[2] * rows);
    auto const target_logit = file::read<float>(in, rows);
    auto const target = file::read<int64_t>(in, rows);
    auto const slot = file::read<int>(in, sizes[4]);
    auto const temperature = file::read<float>(in, sizes[5]);
    std::vector<std::vector<float>> results(5, std::vector<float>(rows, NAN));
    std::vector<float> statistics(sizes[7] ? 4 * rows : 0, NAN);
    ek::Merge a = {};
    a.partials = partials.data();
    a.target_logit = target_logit.data();
    a.slot = slot.empty() ? nullptr : slot.data();
    a.target = target.data();
    a.temperature = temperature.empty() ? nullptr : temperature.data();
    a.stride_temperature = sizes[6];
    a.logprob = results[0].data();
    a.entropy = results[1].data();
    a.logsumexp = results[2].data();
    a.max = results[3].data();
    a.log_sum = results[4].data();
    a.statistics = sizes[7] ? statistics.data() : nullptr;
    a.rows = static_cast<int>(rows);
    a.vocabulary = static_cast<int>(sizes[1]);
    a.splits = static_cast<int>(sizes[2]);
    a.ignore_index = sizes[3];
    ek::merge(a, nullptr);
    for (auto const& result : results) file::write(out, result);
    file::write(out, statistics);
  }
}
