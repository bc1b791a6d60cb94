#include "network.h"

#include "error.h"

namespace edgeqdm {

std::size_t conditioning_size(const Table& table) noexcept {
  std::size_t size = 1;
  for (std::uint32_t k : table.conditioning_size) size *= k;
  return size;
}

Network::Network(const Table& table) {
  const std::int64_t doubled = table.has(layout::flag_learned_variance) ? 2 : 1;
  sample_shape_ = {0, table.channels, table.height, table.width};
  output_shape_ = {0, table.channels * doubled, table.height, table.width};
  if (table.conditioning == layout::conditioning_none) return;
  conditioning_shape_ = {0};
  for (std::size_t k = 0; k < table.conditioning_rank; ++k) {
    conditioning_shape_.push_back(table.conditioning_size[k]);
  }
}

void Network::resize(std::size_t batch) {
  if (batch == batch_) return;
  const auto of = [batch](std::vector<std::int64_t>& shape) {
    std::size_t size = 1;
    for (std::size_t k = 1; k < shape.size(); ++k) size *= static_cast<std::size_t>(shape[k]);
    if (shape.empty()) return std::size_t{0};
    // With room for 8 bytes a value and a doubled batch, so that no product elsewhere overflows.
    if (batch > SIZE_MAX / 16 / size) {
      throw Error(EDGEQDM_RESOURCE, "out of memory - draw fewer images at once");
    }
    shape[0] = static_cast<std::int64_t>(batch);
    return batch * size;
  };
  batch_ = 0;
  sample_.assign(of(sample_shape_), 0.0f);
  output_.assign(of(output_shape_), 0.0f);
  const std::size_t conditioning = of(conditioning_shape_);
  if (conditioning_shape_.size() == 1) labels_.assign(conditioning, 0);
  if (conditioning_shape_.size() > 1) embeddings_.assign(conditioning, 0.0f);
  bind();
  batch_ = batch;
}

}  // namespace edgeqdm
