// What the head's kernels ask of their arguments, said before anything is launched: a descriptor
// that the driver refuses would else be a kernel that reads nothing.
#pragma once
#include <climits>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "error.h"
#include "launch.h"

namespace ek {

// Throws, where `holds` is false: "call: name must be wanted; got ...".
template <class Got>
void ask(bool holds, std::string const& call, std::string const& name, std::string const& wanted,
         Got got) {
  if (!holds)
    throw std::runtime_error(call + ": " + name + " must be " + wanted + "; got " +
                             std::to_string(got));
}

inline void ask_address(std::string const& call, std::string const& name, void const* address,
                        int alignment = 1) {
  auto const number = reinterpret_cast<std::uintptr_t>(address);
  ask(number != 0, call, name, "an address", number);
  ask(number % alignment == 0, call, name,
      "at an address divisible by " + std::to_string(alignment), number);
}

// Rows of bf16, each of `columns`, that copies of 16 bytes and a tensor descriptor can read.
inline void ask_matrix(std::string const& call, std::string const& name, void const* address,
                       int64_t stride, int columns) {
  ask_address(call, name, address, 16);
  ask(stride % 8 == 0, call, "the stride of " + name, "divisible by 8", stride);
  ask(stride >= columns && stride < int64_t(1) << 39, call, "the stride of " + name,
      "from its " + std::to_string(columns) + " columns up to 2^39", stride);
}

// For tiles of `tile`, over columns [start, stop); neither rows nor columns are empty.
inline void ask_head(std::string const& call, Tile const& tile, Head const& head, int start,
                     int stop) {
  ask(head.depth > 0 && head.depth % 8 == 0, call, "the depth", "divisible by 8, and not 0",
      head.depth);
  // The last tile of a cluster ends at most two tiles beyond.
  int const most = INT_MAX - 2 * 256;
  ask(head.rows <= most, call, "the number of rows", "at most " + std::to_string(most), head.rows);
  ask(head.vocabulary <= most, call, "the vocabulary", "at most " + std::to_string(most),
      head.vocabulary);
  ask(start >= 0 && start < stop, call, "start", "from 0 up to stop", start);
  ask(stop <= head.vocabulary, call, "stop", "at most the vocabulary", stop);
  int64_t const tiles = ((int64_t(head.rows) + tile.rows - 1) / tile.rows) *
                        ((int64_t(stop) - start + tile.columns - 1) / tile.columns);
  ask(tiles <= INT_MAX, call, "the number of tiles", "below 2^31", tiles);
  ask_matrix(call, "hidden", head.hidden, head.stride_hidden, head.depth);
  ask_matrix(call, "weight", head.weight, head.stride_weight, head.depth);
}

// Whether the current GPU runs what is compiled for `architecture`.
inline void check_device(std::string const& call, int architecture) {
  int device, major, minor;
  check(cudaGetDevice(&device), call + ": cudaGetDevice");
  auto const attribute = [&](int& value, cudaDeviceAttr which) {
    check(cudaDeviceGetAttribute(&value, which, device), call + ": cudaDeviceGetAttribute");
  };
  attribute(major, cudaDevAttrComputeCapabilityMajor);
  attribute(minor, cudaDevAttrComputeCapabilityMinor);
  int const capability = 10 * major + minor;
  // Code for Ampere runs on what came until Hopper; sm_90a and sm_100a on one capability alone.
  bool const runs = architecture == 80 ? major == 8 : capability == architecture;
  ask(runs, call, "the GPU of a tile for sm_" + std::to_string(architecture),
      architecture == 80 ? "of capability 8.x" : "of that capability", capability);
}

inline std::string name_of(Tile const& tile) {
  return std::to_string(tile.rows) + " x " + std::to_string(tile.columns) + " x " +
         std::to_string(tile.depth) + " on sm_" + std::to_string(tile.architecture);
}

// The kernel of a tile. The last of `compiled` is none, for builds without any.
template <class Compiled, int kCount>
Compiled const& find(char const* call, Compiled const (&compiled)[kCount], Tile const& tile) {
  std::string known;
  for (auto const& each : compiled) {
    Tile const& t = each.tile;
    if (t.rows == 0) break;
    if (t.architecture == tile.architecture && t.rows == tile.rows && t.columns == tile.columns &&
        t.depth == tile.depth)
      return each;
    known += (known.empty() ? "" : ", ") + name_of(t);
  }
  throw std::runtime_error(std::string(call) + ": the tile must be one of those compiled (" +
                           (known.empty() ? "none" : known) + "); got " + name_of(tile));
}

}  // namespace ek
