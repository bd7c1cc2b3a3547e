// What `dlogits` refuses before any launch, and which kernel it takes.
#include <functional>

#include "refusals.h"

#define EK_SM80
#define EK_SM90
#include "dlogits.cu"

namespace ek {

void dlogits_sm80(Head const&, Dlogits const&, int, Stream) { launched = 80; }
template <int kColumns>
void dlogits_sm90(Head const&, Dlogits const&, int, Stream) {
  launched = kColumns;
}
template void dlogits_sm90<128>(Head const&, Dlogits const&, int, Stream);
template void dlogits_sm90<256>(Head const&, Dlogits const&, int, Stream);

}  // namespace ek

namespace {

struct Call {
  ek::Tile tile{90, 128, 256, 64};
  ek::Head head{};
  ek::Dlogits out{};
  int processors = 132;
  Call() {
    head.hidden = at(1024), head.weight = at(4096);
    head.stride_hidden = head.stride_weight = 72;
    head.rows = 300, head.depth = 72, head.vocabulary = 1000;
    out.fields = static_cast<float*>(at(64));
    out.target = static_cast<int64_t*>(at(64));
    out.number = static_cast<int*>(at(64));
    out.dz = at(128), out.stride_dz = 304;
    out.start = 64, out.stop = 364;
  }
};

void expect_call(int kernel, std::string const& wanted, std::function<void(Call&)> change) {
  Call call;
  change(call);
  auto const got =
      refused([&] { ek::dlogits(call.tile, call.head, call.out, call.processors, nullptr); });
  expect(launched == kernel && got == (wanted.empty() ? "" : "dlogits: " + wanted),
         "got kernel " + std::to_string(launched) + " and '" + got + "'; wanted '" + wanted + "'");
}

void takes(int kernel, std::function<void(Call&)> change) { expect_call(kernel, "", change); }
void refuses(std::string const& wanted, std::function<void(Call&)> change) {
  expect_call(0, wanted, change);
}

}  // namespace

int main() {
  takes(256, [](Call&) {});
  takes(128, [](Call& c) { c.tile.columns = 128; });
  takes(0, [](Call& c) { c.head.rows = 0; });
  takes(0, [](Call& c) { c.out.stop = c.out.start; });
  takes(256, [](Call& c) { c.out.start = 700, c.out.stop = 1000; });
  refuses("stop must be at most the vocabulary; got 1001", [](Call& c) { c.out.stop = 1001; });
  refuses("start must be from 0 up to stop; got 400", [](Call& c) { c.out.start = 400; });
  refuses("start must be from 0 up to stop; got -8", [](Call& c) { c.out.start = -8; });
  refuses("weight must be at an address divisible by 16; got 4104",
          [](Call& c) { c.head.weight = at(4104); });
  refuses("fields must be an address; got 0", [](Call& c) { c.out.fields = nullptr; });
  refuses("target must be an address; got 0", [](Call& c) { c.out.target = nullptr; });
  refuses("number must be an address; got 0", [](Call& c) { c.out.number = nullptr; });
  refuses("dz must be an address; got 0", [](Call& c) { c.out.dz = nullptr; });
  refuses("dz must be at an address divisible by 16; got 136", [](Call& c) { c.out.dz = at(136); });
  refuses("the stride of dz must be divisible by 8; got 300",
          [](Call& c) { c.out.stride_dz = 300; });
  refuses("the stride of dz must be from its 300 columns up to 2^39; got 296",
          [](Call& c) { c.out.stride_dz = 296; });
  refuses("processors must be positive; got 0", [](Call& c) { c.processors = 0; });
  refuses(
      "the tile must be one of those compiled (128 x 128 x 64 on sm_80, 128 x 128 x 64 on sm_90, "
      "128 x 256 x 64 on sm_90); got 256 x 256 x 64 on sm_100",
      [](Call& c) { c.tile = {100, 256, 256, 64}; });
  refuses("the GPU of a tile for sm_80 must be of capability 8.x; got 90",
          [](Call& c) { c.tile = {80, 128, 128, 64}; });
  capability = 89;
  takes(80, [](Call& c) { c.tile = {80, 128, 128, 64}; });
  return !right;
}
