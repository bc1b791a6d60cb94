// Draws images: noise, guidance and the solver's steps around the network.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "network.h"
#include "solver.h"

namespace edgeqdm {

// What images are drawn of. The pointers are looked at in begin() only.
struct Draw {
  std::uint64_t seed = 0;
  std::uint32_t first_image = 0;
  std::uint32_t n_images = 0;
  const std::int64_t* labels = nullptr;  // [n_images]
  const float* embeddings = nullptr;     // [n_images, ...]
};

class Sampler {
 public:
  // All three must outlive the sampler. `null_embedding` is empty where there is none.
  Sampler(const Table& table, const std::vector<float>& null_embedding, Network& network)
      : table_(table), null_embedding_(null_embedding), network_(network) {}

  // Checks and copies the conditioning and draws the initial noise. Throws Error.
  void begin(const Draw& draw);
  // One step; allocates nothing. Throws Error; where the network failed, the step may be tried
  // again.
  void step();

  // Forgets what was begun.
  void end() noexcept { solver_ = nullptr; }

  bool begun() const noexcept { return solver_ != nullptr; }
  std::uint32_t steps_done() const noexcept { return solver_->step(); }
  std::uint32_t n_images() const noexcept { return n_images_; }
  const float* samples() const noexcept { return solver_->sample(); }
  std::size_t size() const noexcept { return solver_->size(); }

  // Copies a conditioning to the network; the first half of step(), for the self-test.
  void condition(const Draw& draw);
  // Network output after guidance; `x` is [n_images, C, H, W] of the last condition().
  Output predict(const float* x, std::uint32_t step);

 private:
  void check(const Draw& draw) const;
  bool has_null() const noexcept;
  void fill_labels(const Draw& draw) noexcept;
  void fill_embeddings(const Draw& draw) noexcept;
  void draw_noise(std::uint32_t stream) noexcept;

  const Table& table_;
  const std::vector<float>& null_embedding_;
  Network& network_;
  std::unique_ptr<Solver> solver_;
  std::uint64_t seed_ = 0;
  std::uint32_t first_image_ = 0;
  std::uint32_t n_images_ = 0;
  bool guided_ = false;
  std::vector<float> fed_;
  std::vector<float> noise_;
  std::vector<float> guided_output_;
};

}  // namespace edgeqdm
