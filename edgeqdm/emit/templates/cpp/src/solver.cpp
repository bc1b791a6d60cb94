#include "solver.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

namespace edgeqdm {
namespace {

static_assert(FLT_EVAL_METHOD == 0, "float arithmetic must be rounded to float: use SSE, not x87");

constexpr float smallest_variance = 1e-20f;

// Adds weight * values to the total, or makes it the total where it is the first term.
void add_term(float weight, const float* values, std::size_t n, bool first, float* total) noexcept {
  if (first) {
    for (std::size_t k = 0; k < n; ++k) total[k] = weight * values[k];
  } else {
    for (std::size_t k = 0; k < n; ++k) total[k] = total[k] + weight * values[k];
  }
}

}  // namespace

Solver::Solver(const Table& table, std::size_t n_images)
    : table_(table),
      n_images_(n_images),
      plane_(std::size_t{table.height} * table.width),
      image_(plane_ * table.channels),
      samples_(table.sample_history + 1u, std::vector<float>(n_images * image_)),
      outputs_(table.output_history, std::vector<float>(n_images * image_)),
      sample_weights_(table.sample_history),
      output_weights_(table.output_history),
      noise_std_(table.channels),
      bias_(table.channels),
      absorbed_(table.channels) {
  load_step();
}

void Solver::start(const float* initial) noexcept {
  step_ = 0;
  current_ = 0;
  newest_ = 0;
  for (std::size_t k = 0; k < size(); ++k) samples_[0][k] = table_.initial_sigma * initial[k];
  load_step();
}

float Solver::value(layout::Array array) const noexcept {
  float found = 0.0f;
  table_value(table_, array, step_, &found);
  return found;
}

void Solver::load_step() noexcept {
  if (step_ >= table_.steps) return;
  const auto load = [this](layout::Array array, std::vector<float>& row) {
    table_row(table_, array, step_, row.data(), row.size());
  };
  load(layout::sample_weights, sample_weights_);
  load(layout::output_weights, output_weights_);
  load(layout::noise_std, noise_std_);
  load(layout::bias, bias_);
  load(layout::absorbed, absorbed_);
  log_min_ = value(layout::log_min);
  log_max_ = value(layout::log_max);
  adds_noise_ = std::any_of(noise_std_.begin(), noise_std_.end(), [](float c) { return c != 0; });
}

void Solver::feed(float* fed) const noexcept {
  const float scale = value(layout::input_scale);
  const float* x = sample();
  for (std::size_t k = 0; k < size(); ++k) fed[k] = scale * x[k];
}

void Solver::correct(const float* fed, Output output, float* corrected) const noexcept {
  const bool has = table_.has(layout::flag_correction);
  const float gain = value(layout::gain);
  const float weight = value(layout::input_weight);
  for (std::size_t b = 0; b < n_images_; ++b) {
    for (std::size_t k = 0; k < image_; ++k) {
      const float f = output.values[b * output.image_stride + k];
      corrected[b * image_ + k] = has ? gain * (f - bias_[k / plane_]) : f;
    }
  }
  if (has && weight != 0.0f) add_term(weight, fed, size(), false, corrected);
}

float Solver::learned_std(float variance, std::size_t channel) const noexcept {
  float std;
  if (table_.has(layout::flag_learned_bounds)) {
    const float share = 0.5f * (variance + 1.0f);
    const float upper = share * log_max_;
    const float lower = (1.0f - share) * log_min_;
    std = std::exp(0.5f * (upper + lower));
  } else {
    std = std::sqrt(std::max(variance, smallest_variance));
  }
  if (!table_.has(layout::flag_absorbed)) return std;
  const float budget = std::max(std * std, smallest_variance);
  const float absorbed = absorbed_[channel] / budget;
  const float left = 1.0f - std::min(absorbed, table_.largest_share);
  return std * std::sqrt(std::max(left, smallest_variance / budget));
}

void Solver::add_noise(Output variance, const float* noise, bool first, float* total) noexcept {
  const bool learned = table_.has(layout::flag_learned_variance);
  for (std::size_t b = 0; b < n_images_; ++b) {
    for (std::size_t k = 0; k < image_; ++k) {
      const std::size_t channel = k / plane_;
      float std = noise_std_[channel];
      if (learned) std = std * learned_std(variance.values[b * variance.image_stride + k], channel);
      const std::size_t at = b * image_ + k;
      const float term = std * noise[at];
      total[at] = first ? term : total[at] + term;
    }
  }
}

void Solver::add_clipped(const float* sample, const float* output, bool first,
                         float* total) const noexcept {
  const float p = value(layout::clip_sample_weight);
  const float q = value(layout::clip_output_weight);
  const float weight = value(layout::clip_weight);
  const float limit = table_.clip_limit;
  for (std::size_t k = 0; k < size(); ++k) {
    const float clean = p * sample[k] + q * output[k];
    const float term = weight * std::min(std::max(clean, -limit), limit);
    total[k] = first ? term : total[k] + term;
  }
}

void Solver::advance(const float* fed, Output output, const float* noise) noexcept {
  newest_ = (newest_ + 1) % outputs_.size();
  correct(fed, output, outputs_[newest_].data());
  const std::size_t next = (current_ + 1) % samples_.size();
  float* total = samples_[next].data();
  bool first = true;
  // A weight that reaches back before the first step is 0; table_open() has seen to that.
  for (std::size_t age = 0; age < sample_weights_.size(); ++age) {
    if (sample_weights_[age] == 0.0f) continue;
    const std::size_t place = (current_ + samples_.size() - age) % samples_.size();
    add_term(sample_weights_[age], samples_[place].data(), size(), first, total);
    first = false;
  }
  for (std::size_t age = 0; age < output_weights_.size(); ++age) {
    if (output_weights_[age] == 0.0f) continue;
    const std::size_t place = (newest_ + outputs_.size() - age) % outputs_.size();
    add_term(output_weights_[age], outputs_[place].data(), size(), first, total);
    first = false;
  }
  if (adds_noise_) {
    add_noise({output.values + image_, output.image_stride}, noise, first, total);
    first = false;
  }
  if (table_.has(layout::flag_clip) && value(layout::clip_weight) != 0.0f) {
    add_clipped(samples_[current_].data(), outputs_[newest_].data(), first, total);
    first = false;
  }
  if (first) std::fill_n(total, size(), 0.0f);
  current_ = next;
  ++step_;
  load_step();
}

}  // namespace edgeqdm
