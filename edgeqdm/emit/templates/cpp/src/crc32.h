// CRC-32 of ISO 3309, the one of PNG and zlib: reflected polynomial EDB88320.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace edgeqdm {

constexpr std::array<std::uint32_t, 256> crc32_table() {
  std::array<std::uint32_t, 256> table{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1u) ? 0xEDB88320u : 0u);
    table[byte] = crc;
  }
  return table;
}

// Continues a CRC: crc32(crc32(0, a), b) is that of a followed by b.
inline std::uint32_t crc32(std::uint32_t crc, const unsigned char* bytes, std::size_t n) noexcept {
  static constexpr std::array<std::uint32_t, 256> table = crc32_table();
  crc = ~crc;
  for (std::size_t k = 0; k < n; ++k) crc = (crc >> 8) ^ table[(crc ^ bytes[k]) & 0xFFu];
  return ~crc;
}

}  // namespace edgeqdm
