// Whether bytes are UTF-8 of the Unicode Standard, table 3-7: shortest forms, no surrogates.
#pragma once

#include <cstddef>

namespace edgeqdm {

inline bool is_utf8(const unsigned char* bytes, std::size_t n) noexcept {
  std::size_t at = 0;
  while (at < n) {
    const unsigned char lead = bytes[at++];
    if (lead < 0x80) continue;
    const std::size_t more = lead >= 0xF0 ? 3 : lead >= 0xE0 ? 2 : 1;
    if (lead < 0xC2 || lead > 0xF4 || n - at < more) return false;
    const unsigned char second = bytes[at];
    const unsigned char low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    const unsigned char high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    if (second < low || second > high) return false;
    for (std::size_t k = 1; k < more; ++k) {
      if (bytes[at + k] < 0x80 || bytes[at + k] > 0xBF) return false;
    }
    at += more;
  }
  return true;
}

}  // namespace edgeqdm
