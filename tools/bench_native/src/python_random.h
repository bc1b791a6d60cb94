// Python's random.Random, as far as the order of the graphs needs it: two tools that time one kit
// in the same order drift alike.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace edgeqdm::bench {

// MT19937 with the seeding by a list of Matsumoto & Nishimura 2002, which Python seeds integers
// with; https://doi.org/10.1145/272991.272995.
class PythonRandom {
 public:
  explicit PythonRandom(std::uint32_t seed) noexcept;

  // Uniform in 0 .. n - 1; n is at least 1.
  std::uint32_t below(std::uint32_t n) noexcept;

  template <typename T>
  void shuffle(std::vector<T>& values) {
    for (std::size_t k = values.size(); k > 1; --k) {
      std::swap(values[k - 1], values[below(static_cast<std::uint32_t>(k))]);
    }
  }

 private:
  static constexpr std::size_t size = 624;

  std::uint32_t next() noexcept;
  void refill() noexcept;

  std::array<std::uint32_t, size> state_{};
  std::size_t used_ = size;
};

}  // namespace edgeqdm::bench
