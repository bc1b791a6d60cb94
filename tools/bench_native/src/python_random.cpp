#include "python_random.h"

namespace edgeqdm::bench {
namespace {

constexpr std::size_t middle = 397;
constexpr std::uint32_t twist = 0x9908B0DFu;

std::uint32_t mixed(std::uint32_t word) noexcept { return word ^ (word >> 30); }

}  // namespace

PythonRandom::PythonRandom(std::uint32_t seed) noexcept {
  state_[0] = 19650218u;
  for (std::size_t k = 1; k < size; ++k) {
    state_[k] = 1812433253u * mixed(state_[k - 1]) + static_cast<std::uint32_t>(k);
  }
  // Both passes begin behind the first word and end where they began; the list has one word.
  std::size_t at = 1;
  const auto advance = [&] {
    if (++at < size) return;
    state_[0] = state_[size - 1];
    at = 1;
  };
  for (std::size_t k = 0; k < size; ++k) {
    state_[at] = (state_[at] ^ (mixed(state_[at - 1]) * 1664525u)) + seed;
    advance();
  }
  for (std::size_t k = 1; k < size; ++k) {
    state_[at] =
        (state_[at] ^ (mixed(state_[at - 1]) * 1566083941u)) - static_cast<std::uint32_t>(at);
    advance();
  }
  state_[0] = 0x80000000u;
}

void PythonRandom::refill() noexcept {
  for (std::size_t k = 0; k < size; ++k) {
    const std::uint32_t joined =
        (state_[k] & 0x80000000u) | (state_[(k + 1) % size] & 0x7FFFFFFFu);
    const std::uint32_t odd = (joined & 1u) != 0 ? twist : 0u;
    state_[k] = state_[(k + middle) % size] ^ (joined >> 1) ^ odd;
  }
  used_ = 0;
}

std::uint32_t PythonRandom::next() noexcept {
  if (used_ == size) refill();
  std::uint32_t word = state_[used_++];
  word ^= word >> 11;
  word ^= (word << 7) & 0x9D2C5680u;
  word ^= (word << 15) & 0xEFC60000u;
  return word ^ (word >> 18);
}

std::uint32_t PythonRandom::below(std::uint32_t n) noexcept {
  int bits = 0;
  for (std::uint32_t rest = n; rest != 0; rest >>= 1) ++bits;
  std::uint32_t found = next() >> (32 - bits);
  while (found >= n) found = next() >> (32 - bits);
  return found;
}

}  // namespace edgeqdm::bench
