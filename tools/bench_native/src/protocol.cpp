#include "protocol.h"

#include <algorithm>
#include <cmath>

namespace edgeqdm::bench {

double median(Samples samples) {
  const std::size_t n = samples.size();
  std::sort(samples.begin(), samples.end());
  return (samples[(n - 1) / 2] + samples[n / 2]) / 2;
}

double percentile(Samples samples, double share) {
  std::sort(samples.begin(), samples.end());
  const double place = share * static_cast<double>(samples.size() - 1);
  const auto below = static_cast<std::size_t>(place);
  const std::size_t above = std::min(below + 1, samples.size() - 1);
  return samples[below] + (place - std::floor(place)) * (samples[above] - samples[below]);
}

std::pair<double, double> median_interval(Samples samples) {
  std::sort(samples.begin(), samples.end());
  const auto n = static_cast<double>(samples.size());
  const double half = 0.98 * std::sqrt(n);
  const double low = std::max(0.0, std::floor(n / 2 - half) - 1);
  const double high = std::min(n - 1, std::ceil(n / 2 + half));
  return {samples[static_cast<std::size_t>(low)], samples[static_cast<std::size_t>(high)]};
}

bool finished(const Samples& samples, double ci_target) {
  if (samples.size() < min_runs) return false;
  const auto [low, high] = median_interval(samples);
  return (high - low) / 2 <= ci_target * median(samples);
}

}  // namespace edgeqdm::bench
