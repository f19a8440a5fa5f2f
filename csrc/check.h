// Checks that put their text together only when they fail, and without iostreams.
//
// A library that carries its own copy of libstdc++ (-static-libstdc++, the default of some compilers) shares a process
// with PyTorch's: its streams then write numbers as nothing, or crash. Strings alone do neither.
#pragma once

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <type_traits>

#define MEMTRANS_STRING(text) #text
#define MEMTRANS_STRING_OF(macro) MEMTRANS_STRING(macro)
#define MEMTRANS_CHECK(condition, ...)                                             \
  do {                                                                             \
    if (!(condition)) {                                                            \
      memtrans::fail(__FILE__ ":" MEMTRANS_STRING_OF(__LINE__) ", ", __VA_ARGS__); \
    }                                                                              \
  } while (false)

namespace memtrans {

inline std::string text_of(const std::string& part) { return part; }
inline std::string text_of(const char* part) { return part; }

template <typename Number, typename = std::enable_if_t<std::is_arithmetic_v<Number>>>
std::string text_of(Number part) {
  if constexpr (std::is_floating_point_v<Number>) {
    char text[32];
    std::snprintf(text, sizeof text, "%g", static_cast<double>(part));
    return text;
  } else {
    return std::to_string(part);
  }
}

template <typename... Parts>
[[noreturn, gnu::noinline, gnu::cold]] void fail(const Parts&... parts) {
  std::string text;
  ((text += text_of(parts)), ...);
  throw std::runtime_error(text);
}

}  // namespace memtrans
