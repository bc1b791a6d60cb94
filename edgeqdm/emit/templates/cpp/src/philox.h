// Counter-based normal noise, value for value that of philox.py in the same package.
//
// Philox4x32-10 of Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405, then Box-Muller in
// float64, rounded to float32 at the end. Stream 0 is the initial sample, stream 1 + i the noise of
// step i.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace edgeqdm {

inline constexpr std::uint32_t initial_stream = 0;

inline constexpr std::uint32_t step_stream(std::uint32_t step) { return 1 + step; }

// Ten rounds; the key is the seed, low word first.
std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter,
                                        std::uint64_t key) noexcept;

// Unit-normal noise of one image: `n` values, n / 4 < 2^32.
void standard_normal(std::uint64_t seed, std::uint32_t stream, std::uint32_t image, float* values,
                     std::size_t n) noexcept;

}  // namespace edgeqdm
