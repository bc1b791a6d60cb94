// The network of a package: buffers that are allocated once per batch size, and one call a step.
// The target's own source file says how to open and run it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "table.h"

namespace edgeqdm {

class Network {
 public:
  explicit Network(const Table& table);
  virtual ~Network() = default;
  Network(const Network&) = delete;
  Network& operator=(const Network&) = delete;

  // Sets the number of images that are evaluated at once.
  void resize(std::size_t batch);

  // What is fed: [batch, C, H, W] and, by the model's kind, [batch] or [batch, ...].
  float* sample() noexcept { return sample_.data(); }
  std::int64_t* labels() noexcept { return labels_.data(); }
  float* embeddings() noexcept { return embeddings_.data(); }
  // What came out: [batch, C, H, W], or [batch, 2C, H, W] with a learned variance.
  const float* output() const noexcept { return output_.data(); }

  // Evaluates what is fed at this step. Throws Error.
  virtual void run(std::uint32_t step) = 0;

 protected:
  // Told that the buffers have new places and sizes.
  virtual void bind() = 0;

  std::size_t batch() const noexcept { return batch_; }

  std::vector<float> sample_;
  std::vector<std::int64_t> labels_;
  std::vector<float> embeddings_;
  std::vector<float> output_;
  std::vector<std::int64_t> sample_shape_;
  std::vector<std::int64_t> conditioning_shape_;
  std::vector<std::int64_t> output_shape_;

 private:
  std::size_t batch_ = 0;
};

// Number of values of one conditioning: 1 for a label.
std::size_t conditioning_size(const Table& table) noexcept;

struct NetworkOptions {
  int threads = 1;
  std::string provider;  // "": the CPU's
  std::string library;   // file of the runtime's library; "": where it is looked for
};

// A model in files, by the first step that each serves, or in memory; `bytes` decides where it is
// not NULL.
struct ModelSource {
  std::map<std::uint32_t, std::string> paths;
  const void* bytes = nullptr;
  std::size_t n_bytes = 0;
};

// Provided by the target. Throws Error: UNSUPPORTED for a library or provider that cannot do it,
// VERIFY for a model that is damaged or does not fit the table.
std::unique_ptr<Network> open_network(const ModelSource& source, const Table& table,
                                      const NetworkOptions& options);

}  // namespace edgeqdm
