#include "sampler.h"

#include <algorithm>
#include <string>

#include "bytes.h"
#include "error.h"
#include "philox.h"

namespace edgeqdm {
namespace {

std::size_t image_size(const Table& table) noexcept {
  return std::size_t{table.channels} * table.height * table.width;
}

}  // namespace

bool Sampler::has_null() const noexcept {
  return table_.conditioning == layout::conditioning_label ? table_.null_label >= 0
                                                           : !null_embedding_.empty();
}

void Sampler::check(const Draw& draw) const {
  const auto refuse = [](const std::string& reason) { throw Error(EDGEQDM_INPUT, reason); };
  if (draw.n_images == 0) refuse("the number of images must be at least 1");
  if (draw.n_images - 1 > UINT32_MAX - draw.first_image) refuse("image numbers end at 2^32 - 1");
  const bool label = table_.conditioning == layout::conditioning_label;
  const bool embedding = table_.conditioning == layout::conditioning_embedding;
  if (label && draw.labels == nullptr) refuse("this model needs a label for every image");
  if (embedding && draw.embeddings == nullptr) {
    refuse("this model needs an embedding for every image");
  }
  if (!label && draw.labels != nullptr) {
    refuse(embedding ? "this model needs an embedding, not int64" : "this model takes no label");
  }
  if (!embedding && draw.embeddings != nullptr) {
    refuse(label ? "this model needs a label, not float32"
                 : "this model takes no label and no embedding");
  }
  for (std::uint32_t k = 0; label && k < draw.n_images; ++k) {
    if (draw.labels[k] < 0 || draw.labels[k] >= std::int64_t{table_.labels}) {
      refuse("label " + std::to_string(draw.labels[k]) + " is out of range 0.." +
             std::to_string(table_.labels - 1));
    }
  }
  if (embedding && !all_finite(draw.embeddings, draw.n_images * conditioning_size(table_))) {
    refuse("an embedding holds NaN or infinity");
  }
}

void Sampler::condition(const Draw& draw) {
  check(draw);
  guided_ = table_.has(layout::flag_guided) && has_null() &&
            table_.conditioning != layout::conditioning_none;
  n_images_ = draw.n_images;
  network_.resize(std::size_t{n_images_} * (guided_ ? 2u : 1u));
  const std::size_t doubled = table_.has(layout::flag_learned_variance) ? 2 : 1;
  guided_output_.assign(guided_ ? n_images_ * image_size(table_) * doubled : 0, 0.0f);
  if (table_.conditioning == layout::conditioning_label) fill_labels(draw);
  if (table_.conditioning == layout::conditioning_embedding) fill_embeddings(draw);
}

void Sampler::fill_labels(const Draw& draw) noexcept {
  std::int64_t* fed = network_.labels();
  if (guided_) fed = std::fill_n(fed, n_images_, std::int64_t{table_.null_label});
  std::copy_n(draw.labels, n_images_, fed);
}

void Sampler::fill_embeddings(const Draw& draw) noexcept {
  float* fed = network_.embeddings();
  for (std::uint32_t k = 0; guided_ && k < n_images_; ++k) {
    fed = std::copy(null_embedding_.begin(), null_embedding_.end(), fed);
  }
  std::copy_n(draw.embeddings, n_images_ * conditioning_size(table_), fed);
}

void Sampler::begin(const Draw& draw) {
  solver_ = nullptr;
  condition(draw);
  seed_ = draw.seed;
  first_image_ = draw.first_image;
  auto solver = std::make_unique<Solver>(table_, n_images_);
  fed_.assign(solver->size(), 0.0f);
  noise_.assign(solver->size(), 0.0f);
  draw_noise(initial_stream);
  solver->start(noise_.data());
  solver_ = std::move(solver);
}

void Sampler::draw_noise(std::uint32_t stream) noexcept {
  const std::size_t image = image_size(table_);
  for (std::uint32_t k = 0; k < n_images_; ++k) {
    standard_normal(seed_, stream, first_image_ + k, noise_.data() + k * image, image);
  }
}

// Ho & Salimans 2022, equation 6 with s = 1 + w, https://arxiv.org/abs/2207.12598. A learned
// variance is no score to be extrapolated: it is that of the conditional half.
Output Sampler::predict(const float* x, std::uint32_t step) {
  const std::size_t image = image_size(table_);
  const std::size_t n = n_images_ * image;
  float* fed = std::copy_n(x, n, network_.sample());
  if (guided_) std::copy_n(x, n, fed);
  network_.run(step);
  const std::size_t stride = table_.has(layout::flag_learned_variance) ? 2 * image : image;
  if (!guided_) return {network_.output(), stride};
  const float* without = network_.output();
  const float* with = without + n_images_ * stride;
  for (std::size_t k = 0; k < n_images_ * stride; ++k) {
    const bool variance = k % stride >= image;
    guided_output_[k] =
        variance ? with[k] : without[k] + table_.guidance * (with[k] - without[k]);
  }
  return {guided_output_.data(), stride};
}

void Sampler::step() {
  const std::uint32_t step = solver_->step();
  solver_->feed(fed_.data());
  const Output output = predict(fed_.data(), step);
  if (!all_finite(output.values, n_images_ * output.image_stride)) {
    throw Error(EDGEQDM_NUMERICAL,
                "the network gave NaN or infinity at step " + std::to_string(step));
  }
  if (solver_->adds_noise()) draw_noise(step_stream(step));
  solver_->advance(fed_.data(), output, noise_.data());
  if (!all_finite(samples(), size())) {
    throw Error(EDGEQDM_NUMERICAL,
                "the samples are NaN or infinite after step " + std::to_string(step));
  }
}

}  // namespace edgeqdm
