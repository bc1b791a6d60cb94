// SHA-256 of FIPS 180-4.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace edgeqdm {

class Sha256 {
 public:
  void update(const unsigned char* bytes, std::size_t n) noexcept;
  // 64 lower-case hexadecimal digits; ends the computation.
  std::string hex();

 private:
  void compress(const unsigned char* block) noexcept;

  std::array<std::uint32_t, 8> state_ = {0x6A09E667u, 0xBB67AE85u, 0x3C6EF372u, 0xA54FF53Au,
                                         0x510E527Fu, 0x9B05688Cu, 0x1F83D9ABu, 0x5BE0CD19u};
  std::array<unsigned char, 64> block_{};
  std::size_t filled_ = 0;
  std::uint64_t n_bytes_ = 0;
};

}  // namespace edgeqdm
