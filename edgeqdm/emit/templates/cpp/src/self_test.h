// The golden run of a package: what a correct runtime must reproduce.
#pragma once

#include <string>
#include <vector>

#include "files.h"
#include "sampler.h"

namespace edgeqdm {

struct SelfTest {
  std::vector<double> deviation;  // RMS of the difference over the quantization noise, per step
  double sampler;                 // largest difference of the replayed sampler, relative
  bool passed;
};

// Replays golden.safetensors. Throws Error, VERIFY, where it does not fit the table.
SelfTest self_test(const Table& table, Sampler& sampler, const Bytes& golden);

}  // namespace edgeqdm
