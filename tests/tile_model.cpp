// Runs the tile model alone, and Kernels::agrees on faulty instructions. test_tile_model.py
// compiles and drives it. Operands come on standard input.
#include "tile_instructions.h"

namespace EK_ISA {

// The model with a fault that main chooses.
struct Faulty : TileModel {
  enum Fault { none, swapped_columns, repeated_rows, kept_sums };
  static inline Fault fault = none;

  template <int T>
  static void zero() {
    if (fault != kept_sums) TileModel::zero<T>();
  }
  template <int T>
  static void load(const void* from, std::int64_t stride) {
    TileModel::load<T>(from, fault == repeated_rows && T == 5 ? 0 : stride);
  }
  template <int C, int A, int B>
  static void dot() {
    if (fault == swapped_columns)
      TileModel::dot<C, A, 13 - B>();
    else
      TileModel::dot<C, A, B>();
  }
};

}  // namespace EK_ISA

#define EK_TILES Faulty
#define EK_OTHERS nobody
#include <string>

#include "kernels_per_isa.cpp"

const entropy_kernels::Kernels nobody::kernels{};

namespace {

using EK_ISA::Faulty;
using EK_ISA::TileConfiguration;
using EK_ISA::TileModel;

// Configures registers 0, 4 and 6 as c [rows][columns], a [rows][pairs] and b [pairs][columns].
TileConfiguration shape(int rows, int pairs, int columns) {
  TileConfiguration c;
  c.rows[0] = c.rows[4] = std::uint8_t(rows), c.rows[6] = std::uint8_t(pairs);
  c.row_bytes[0] = c.row_bytes[6] = std::uint16_t(4 * columns);
  c.row_bytes[4] = std::uint16_t(4 * pairs);
  return c;
}

int dot(int rows, int pairs, int columns) {
  std::vector<std::uint32_t> a(rows * pairs), b(pairs * columns), c(rows * columns);
  for (auto* operand : {&a, &b, &c})
    if (std::fread(operand->data(), 4, operand->size(), stdin) != operand->size()) return 3;
  TileModel::configure(shape(rows, pairs, columns));
  TileModel::load<0>(c.data(), 4 * columns);
  TileModel::load<4>(a.data(), 4 * pairs);
  TileModel::load<6>(b.data(), 4 * columns);
  TileModel::dot<0, 4, 6>();
  TileModel::store<0>(c.data(), 4 * columns);
  TileModel::release();
  std::fwrite(c.data(), 4, c.size(), stdout);
  return 0;
}

// Misuses the model in the way of that name, which ends the process.
int misuse(const std::string& name) {
  std::uint32_t memory[256] = {};
  TileConfiguration c;
  if (name == "no configuration") return TileModel::zero<0>(), 0;
  if (name == "palette") c.palette = 2;
  if (name == "too many rows") c.rows[3] = 17;
  if (name == "too long rows") c.row_bytes[3] = 68;
  if (name == "rows of no bytes") c.row_bytes[3] = 0;
  if (name == "a ninth register") c.rows[8] = 16, c.row_bytes[8] = 64;
  if (name == "reserved bytes") c.reserved[5] = 1;
  if (name == "register left out") c.rows[0] = 0, c.row_bytes[0] = 0;
  if (name == "rows of c") c.rows[0] = 15;
  if (name == "columns of b") c.row_bytes[6] = 60;
  if (name == "pairs of a") c.row_bytes[4] = 60;
  if (name == "half a pair") c.row_bytes[0] = c.row_bytes[6] = 62;
  TileModel::configure(c);
  if (name == "released") TileModel::release();
  TileModel::zero<0>();
  TileModel::load<4>(memory, 64);
  TileModel::load<6>(memory, 64);
  TileModel::dot<0, 4, 6>();
  return 0;
}

}  // namespace

int main(int count, char** argument) {
  const std::string task = argument[1];
  if (task == "dot" && count == 5)
    return dot(std::atoi(argument[2]), std::atoi(argument[3]), std::atoi(argument[4]));
  if (task == "misuse") return misuse(argument[2]);
  Faulty::fault = Faulty::Fault(std::atoi(argument[2]));
  return EK_ISA::kernels.agrees() ? 0 : 1;
}
