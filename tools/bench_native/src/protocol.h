// When a measurement is finished: the rules and numbers of edgeqdm/profile/protocol.py.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

namespace edgeqdm::bench {

inline constexpr int n_rounds = 3;
inline constexpr std::size_t min_runs = 30;
inline constexpr double default_ci_target = 0.01;
inline constexpr double warm_up_seconds = 0.2;
inline constexpr std::size_t block_runs = 5;
inline constexpr std::size_t max_runs = 1000;
inline constexpr double reference_every_s = 30.0;

using Samples = std::vector<double>;

// Of at least one sample.
double median(Samples samples);
// The value below which a share of the samples lies, between two of them by their distance.
double percentile(Samples samples, double share);
// 95 % confidence interval of the median, two order statistics.
std::pair<double, double> median_interval(Samples samples);
// Whether there are enough samples and their median is known well enough.
bool finished(const Samples& samples, double ci_target);

}  // namespace edgeqdm::bench
