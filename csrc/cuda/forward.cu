// Which forward runs, and what it asks of its arguments.
#include "forward_kernels.h"
#include "head_checks.h"

namespace ek {
namespace {

using Launch = void (*)(Head const&, Forward const&, int processors, Stream);

struct Compiled {
  Tile tile;
  Launch launch[2];  // without statistics, and with them
};

constexpr Compiled kCompiled[] = {
#ifdef EK_SM80
    {{80, 128, 128, 64}, {forward_sm80<false>, forward_sm80<true>}},
#endif
#ifdef EK_SM90
    {{90, 128, 128, 64}, {forward_sm90<128, false>, forward_sm90<128, true>}},
    {{90, 128, 256, 64}, {forward_sm90<256, false>, forward_sm90<256, true>}},
#endif
#ifdef EK_SM100
    {{100, 256, 256, 64}, {forward_sm100<false>, forward_sm100<true>}},
#endif
    {{0, 0, 0, 0}, {nullptr, nullptr}},
};

}  // namespace

int forward_splits(Tile const& tile, int vocabulary) {
  find("forward_splits", kCompiled, tile);
  return vocabulary / tile.columns + (vocabulary % tile.columns != 0);
}

void forward(Tile const& tile, Head const& head, Forward const& out, int processors,
             Stream stream) {
  char const* const call = "forward";
  Compiled const& compiled = find(call, kCompiled, tile);
  if (head.rows == 0 || head.vocabulary == 0) return;
  ask_head(call, tile, head, 0, head.vocabulary);
  ask_address(call, "partials", out.partials);
  ask_address(call, "target_logit", out.target_logit);
  ask_address(call, "target", out.target);
  ask_address(call, "number", out.number);
  if (out.logits != nullptr) ask_address(call, "index", out.index);
  int const splits = forward_splits(tile, head.vocabulary);
  ask(out.splits == splits, call, "splits", std::to_string(splits), out.splits);
  ask(processors > 0, call, "processors", "positive", processors);
  check_device(call, tile.architecture);
  compiled.launch[out.statistics](head, out, processors, stream);
}

}  // namespace ek
