// Times whole evaluations of a package: the network with guidance, once in every phase.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "protocol.h"
#include "stopwatch.h"

namespace edgeqdm::bench {

struct PhaseTime {
  std::uint32_t start;  // first step
  std::uint32_t stop;
  Samples us;
};

struct PackageLimits {
  double seconds;      // least per phase, warm-up included
  double max_seconds;  // most per phase, warm-up included
  unsigned threads;
};

// One image, phases in changing order. Throws Error: INPUT where there is no package, VERIFY for a
// damaged one.
std::vector<PhaseTime> time_package(const std::string& folder, const PackageLimits& limits,
                                    const Stopwatch& stopwatch);

// JSON fields without braces: phases, and their times weighted by their steps.
std::string phases_text(const std::vector<PhaseTime>& phases);

}  // namespace edgeqdm::bench
