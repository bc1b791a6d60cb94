#include "philox.h"

#include <cmath>

namespace edgeqdm {
namespace {

constexpr double two_pi = 6.283185307179586;  // 2 pi, rounded to float64
constexpr double two_to_32 = 4294967296.0;

void box_muller(std::uint32_t first, std::uint32_t second, float* pair) noexcept {
  const double u1 = (static_cast<double>(first) + 1.0) / two_to_32;
  const double u2 = static_cast<double>(second) / two_to_32;
  const double radius = std::sqrt(-2.0 * std::log(u1));
  const double angle = two_pi * u2;
  pair[0] = static_cast<float>(radius * std::cos(angle));
  pair[1] = static_cast<float>(radius * std::sin(angle));
}

}  // namespace

std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> words,
                                        std::uint64_t key) noexcept {
  auto low = static_cast<std::uint32_t>(key);
  auto high = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t left = std::uint64_t{0xD2511F53u} * words[0];
    const std::uint64_t right = std::uint64_t{0xCD9E8D57u} * words[2];
    words = {static_cast<std::uint32_t>(right >> 32) ^ words[1] ^ low,
             static_cast<std::uint32_t>(right),
             static_cast<std::uint32_t>(left >> 32) ^ words[3] ^ high,
             static_cast<std::uint32_t>(left)};
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
  return words;
}

void standard_normal(std::uint64_t seed, std::uint32_t stream, std::uint32_t image, float* values,
                     std::size_t n) noexcept {
  for (std::size_t start = 0; start < n; start += 4) {
    const auto block = static_cast<std::uint32_t>(start / 4);
    const std::array<std::uint32_t, 4> words = philox4x32({block, 0, stream, image}, seed);
    float drawn[4];
    box_muller(words[0], words[1], drawn);
    box_muller(words[2], words[3], drawn + 2);
    for (std::size_t k = 0; k < 4 && start + k < n; ++k) values[start + k] = drawn[k];
  }
}

}  // namespace edgeqdm
