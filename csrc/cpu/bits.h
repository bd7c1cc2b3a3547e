// Values read from bytes, and bits read as another type: C++20's std::bit_cast.
#pragma once

#include <cstring>

// Static, since a function that files of several instruction sets share would be merged into one.
template <class T>
static inline T read_as(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class To, class From>
static inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the types must have the same size");
  return read_as<To>(&from);
}
