// What `forward` refuses before any launch, and which kernel it takes.
#include <functional>

#include "refusals.h"

#define EK_SM80
#define EK_SM90
#include "forward.cu"

namespace ek {

template <bool kStatistics>
void forward_sm80(Head const&, Forward const&, int, Stream) {
  launched = 80000 + kStatistics;
}
template <int kColumns, bool kStatistics>
void forward_sm90(Head const&, Forward const&, int, Stream) {
  launched = 90000 + 10 * kColumns + kStatistics;
}
template void forward_sm80<false>(Head const&, Forward const&, int, Stream);
template void forward_sm80<true>(Head const&, Forward const&, int, Stream);
template void forward_sm90<128, false>(Head const&, Forward const&, int, Stream);
template void forward_sm90<128, true>(Head const&, Forward const&, int, Stream);
template void forward_sm90<256, false>(Head const&, Forward const&, int, Stream);
template void forward_sm90<256, true>(Head const&, Forward const&, int, Stream);

}  // namespace ek

namespace {

struct Call {
  ek::Tile tile{90, 128, 256, 64};
  ek::Head head{};
  ek::Forward out{};
  int processors = 132;
  Call() {
    head.hidden = at(1024), head.weight = at(4096);
    head.stride_hidden = head.stride_weight = 72;
    head.rows = 300, head.depth = 72, head.vocabulary = 1000;
    out.partials = out.target_logit = static_cast<float*>(at(64));
    out.target = static_cast<int64_t*>(at(64));
    out.index = out.number = static_cast<int*>(at(64));
    out.splits = 4;
  }
};

// What `forward` says, with one thing changed; "" where it launches.
std::string said(std::function<void(Call&)> change) {
  Call call;
  change(call);
  return refused([&] { ek::forward(call.tile, call.head, call.out, call.processors, nullptr); });
}

void refuses(std::string const& wanted, std::function<void(Call&)> change) {
  std::string const text = said(change);
  expect(text == "forward: " + wanted, "got '" + text + "'; wanted 'forward: " + wanted + "'");
}

void takes(int kernel, std::function<void(Call&)> change) {
  std::string const text = said(change);
  expect(text.empty() && launched == kernel,
         "got kernel " + std::to_string(launched) + " and '" + text + "'");
}

void refuse_matrices() {
  refuses("hidden must be at an address divisible by 16; got 1032",
          [](Call& c) { c.head.hidden = reinterpret_cast<void*>(1032); });
  refuses("weight must be an address; got 0", [](Call& c) { c.head.weight = nullptr; });
  refuses("the stride of hidden must be divisible by 8; got 76",
          [](Call& c) { c.head.stride_hidden = 76; });
  refuses("the stride of weight must be from its 72 columns up to 2^39; got 64",
          [](Call& c) { c.head.stride_weight = 64; });
  refuses("the stride of weight must be from its 72 columns up to 2^39; got 549755813888",
          [](Call& c) { c.head.stride_weight = int64_t(1) << 39; });
  refuses("the depth must be divisible by 8, and not 0; got 0", [](Call& c) { c.head.depth = 0; });
  refuses("the depth must be divisible by 8, and not 0; got 68",
          [](Call& c) { c.head.depth = 68; });
  refuses("the number of rows must be at most 2147483135; got 2147483136",
          [](Call& c) { c.head.rows = 2147483136; });
  refuses("the vocabulary must be at most 2147483135; got 2147483647",
          [](Call& c) { c.head.vocabulary = 2147483647; });
  refuses("the number of tiles must be below 2^31; got 4294967296", [](Call& c) {
    c.head.rows = 1 << 23;
    c.head.vocabulary = 1 << 24;
  });
}

void refuse_outputs() {
  refuses("partials must be an address; got 0", [](Call& c) { c.out.partials = nullptr; });
  refuses("target_logit must be an address; got 0", [](Call& c) { c.out.target_logit = nullptr; });
  refuses("target must be an address; got 0", [](Call& c) { c.out.target = nullptr; });
  refuses("number must be an address; got 0", [](Call& c) { c.out.number = nullptr; });
  refuses("index must be an address; got 0",
          [](Call& c) { c.out.logits = c.out.partials, c.out.index = nullptr; });
  refuses("splits must be 4; got 3", [](Call& c) { c.out.splits = 3; });
  refuses("processors must be positive; got 0", [](Call& c) { c.processors = 0; });
}

}  // namespace

int main() {
  takes(92560, [](Call&) {});
  takes(92561, [](Call& c) { c.out.statistics = true; });
  takes(91280, [](Call& c) { c.tile.columns = 128, c.out.splits = 8; });
  takes(0, [](Call& c) { c.head.rows = 0; });
  takes(0, [](Call& c) { c.head.vocabulary = 0; });
  takes(92560, [](Call& c) { c.out.index = nullptr; });
  refuse_matrices();
  refuse_outputs();
  std::string const known =
      "128 x 128 x 64 on sm_80, 128 x 128 x 64 on sm_90, 128 x 256 x 64 on "
      "sm_90";
  refuses("the tile must be one of those compiled (" + known + "); got 128 x 64 x 64 on sm_90",
          [](Call& c) { c.tile.columns = 64; });
  refuses("the tile must be one of those compiled (" + known + "); got 64 x 256 x 64 on sm_90",
          [](Call& c) { c.tile.rows = 64; });
  refuses("the tile must be one of those compiled (" + known + "); got 128 x 256 x 32 on sm_90",
          [](Call& c) { c.tile.depth = 32; });
  refuses("the tile must be one of those compiled (" + known + "); got 256 x 256 x 64 on sm_100",
          [](Call& c) { c.tile = {100, 256, 256, 64}; });
  capability = 86;
  takes(80001, [](Call& c) {
    c.tile = {80, 128, 128, 64}, c.out = Call().out, c.out.splits = 8, c.out.statistics = true;
  });
  refuses("the GPU of a tile for sm_90 must be of that capability; got 86", [](Call&) {});
  capability = 100;
  refuses("the GPU of a tile for sm_80 must be of capability 8.x; got 100",
          [](Call& c) { c.tile = {80, 128, 128, 64}, c.out.splits = 8; });
  answer = cudaErrorInsufficientDriver;
  expect(!forgotten, "no error of CUDA's is taken where there is none");
  refuses("cudaGetDevice: cudaErrorName, why", [](Call&) {});
  expect(forgotten, "an error that is told is not left for the next call");
  expect(ek::forward_splits({90, 128, 256, 64}, 513) == 3, "splits are rounded up");
  expect(ek::forward_splits({90, 128, 256, 64}, 2147483647) == 8388608, "also of the largest");
  return !right;
}
