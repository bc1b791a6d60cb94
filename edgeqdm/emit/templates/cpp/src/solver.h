// Runs the sampler's table, operation for operation as solver.py in the same package does.
//
//   x[i+1] = sum_k a[i, k] x[i-k] + sum_j b[i, j] f[i-j] + c[i] z
//            + d[i] clip(p[i] x[i] + q[i] f[i])
//
// Every product and every sum is rounded to float32, terms are added in this order, and a term
// whose weight is 0 is left out. The build must not contract a product and a sum into one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "table.h"

namespace edgeqdm {

// Network output of a batch: image b starts at `values + b * image_stride`.
struct Output {
  const float* values;
  std::size_t image_stride;
};

class Solver {
 public:
  // Allocates everything; `table` and its bytes must outlive the solver.
  Solver(const Table& table, std::size_t n_images);

  // Starts with unit-normal noise, float32 [B, C, H, W]; initial_sigma is applied here.
  void start(const float* initial) noexcept;

  // Index of the next step; the number of steps when there is none.
  std::uint32_t step() const noexcept { return step_; }
  // x[step], float32 [B, C, H, W].
  const float* sample() const noexcept { return samples_[current_].data(); }
  std::size_t size() const noexcept { return n_images_ * image_; }

  // What the network is fed: input_scale[step] * x[step].
  void feed(float* fed) const noexcept;
  // Whether the next step needs noise.
  bool adds_noise() const noexcept { return adds_noise_; }

  // One step. `output` is f after guidance, [B, C, H, W], or [B, 2C, H, W] with a learned variance;
  // `fed` is what the network was fed; `noise` is z, looked at only where the step adds noise.
  void advance(const float* fed, Output output, const float* noise) noexcept;

 private:
  void load_step() noexcept;
  void correct(const float* fed, Output output, float* corrected) const noexcept;
  void add_noise(Output variance, const float* noise, bool first, float* total) noexcept;
  void add_clipped(const float* sample, const float* output, bool first,
                   float* total) const noexcept;
  float learned_std(float variance, std::size_t channel) const noexcept;
  float value(layout::Array array) const noexcept;

  const Table& table_;
  std::size_t n_images_;
  std::size_t plane_;  // H W
  std::size_t image_;  // C H W
  std::uint32_t step_ = 0;
  bool adds_noise_ = false;
  // Rings: x[i-k] is k places before `current_`, with one more place for x[i+1]; f alike.
  std::vector<std::vector<float>> samples_;
  std::vector<std::vector<float>> outputs_;
  std::size_t current_ = 0;
  std::size_t newest_ = 0;
  // Rows of the next step.
  std::vector<float> sample_weights_;
  std::vector<float> output_weights_;
  std::vector<float> noise_std_;
  std::vector<float> bias_;
  std::vector<float> absorbed_;
  float log_min_ = 0.0f;
  float log_max_ = 0.0f;
};

}  // namespace edgeqdm
