// What answers.py gives a test program, and takes from it: files of raw numbers.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace file {

// The next `count` numbers, in memory of just their size; the program ends where the file does.
template <class T>
std::vector<T> read(std::FILE* from, size_t count) {
  std::vector<T> values(count);
  if (count && std::fread(values.data(), sizeof(T), count, from) != count) std::exit(0);
  return values;
}

template <class T>
void write(std::FILE* to, std::vector<T> const& values) {
  if (!values.empty()) std::fwrite(values.data(), sizeof(T), values.size(), to);
}

}  // namespace file
