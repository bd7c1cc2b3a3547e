// Which kernel of dz runs, and what it asks of its arguments.
#include "dlogits_kernels.h"
#include "head_checks.h"

namespace ek {
namespace {

struct Compiled {
  Tile tile;
  void (*launch)(Head const&, Dlogits const&, int processors, Stream);
};

constexpr Compiled kCompiled[] = {
#ifdef EK_SM80
    {{80, 128, 128, 64}, dlogits_sm80},
#endif
#ifdef EK_SM90
    {{90, 128, 128, 64}, dlogits_sm90<128>},
    {{90, 128, 256, 64}, dlogits_sm90<256>},
#endif
    {{0, 0, 0, 0}, nullptr},
};

}  // namespace

void dlogits(Tile const& tile, Head const& head, Dlogits const& out, int processors,
             Stream stream) {
  char const* const call = "dlogits";
  Compiled const& compiled = find(call, kCompiled, tile);
  if (head.rows == 0 || out.start == out.stop) return;
  ask_head(call, tile, head, out.start, out.stop);
  ask_address(call, "fields", out.fields);
  ask_address(call, "target", out.target);
  ask_address(call, "number", out.number);
  // Columns are stored by sixteen bytes.
  ask_matrix(call, "dz", out.dz, out.stride_dz, out.stop - out.start);
  ask(processors > 0, call, "processors", "positive", processors);
  check_device(call, tile.architecture);
  compiled.launch(head, out, processors, stream);
}

}  // namespace ek
