// Numbers out of bytes, whatever the alignment and the byte order of the host.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace edgeqdm {

template <typename Unsigned>
inline Unsigned read_le(const unsigned char* bytes) noexcept {
  Unsigned value = 0;
  for (std::size_t k = 0; k < sizeof(Unsigned); ++k) {
    value = static_cast<Unsigned>(value | static_cast<Unsigned>(Unsigned{bytes[k]} << (8 * k)));
  }
  return value;
}

inline float read_f32_le(const unsigned char* bytes) noexcept {
  const std::uint32_t bits = read_le<std::uint32_t>(bytes);
  float value;
  static_assert(sizeof value == sizeof bits, "float must be IEEE 754 binary32");
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline double read_f64_le(const unsigned char* bytes) noexcept {
  const std::uint64_t bits = read_le<std::uint64_t>(bytes);
  double value;
  static_assert(sizeof value == sizeof bits, "double must be IEEE 754 binary64");
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Not std::isfinite: with -ffast-math of an embedding project that is always true.
inline bool is_finite(float value) noexcept {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return (bits & 0x7F800000u) != 0x7F800000u;
}

inline bool all_finite(const float* values, std::size_t n) noexcept {
  for (std::size_t k = 0; k < n; ++k) {
    if (!is_finite(values[k])) return false;
  }
  return true;
}

}  // namespace edgeqdm
