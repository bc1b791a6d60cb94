// What the tests of the C++ runtime call through ctypes: one function per thing they look at.
#include <cstdint>
#include <cstring>
#include <string>

#include "edgeqdm.h"
#include "error.h"
#include "image.h"
#include "json.h"
#include "manifest.h"
#include "philox.h"
#include "sampler.h"
#include "sha256.h"
#include "solver.h"
#include "table.h"
#include "tensors.h"

namespace {

using edgeqdm::Bytes;

// (step, batch, sample, labels or NULL, embeddings or NULL, output)
using Evaluate = void (*)(std::uint32_t, std::uint64_t, const float*, const std::int64_t*,
                          const float*, float*);

class CalledBack final : public edgeqdm::Network {
 public:
  CalledBack(const edgeqdm::Table& table, Evaluate evaluate)
      : Network(table), evaluate_(evaluate) {}

  void run(std::uint32_t step) override {
    evaluate_(step, batch(), sample_.data(), labels_.empty() ? nullptr : labels_.data(),
              embeddings_.empty() ? nullptr : embeddings_.data(), output_.data());
  }

 protected:
  void bind() override {}

 private:
  Evaluate evaluate_;
};

template <typename Work>
int status_of(const Work& work, char* message, std::size_t size) {
  try {
    work();
    return 0;
  } catch (const edgeqdm::Error& error) {
    std::strncpy(message, error.what(), size - 1);
    message[size - 1] = '\0';
    return error.status();
  }
}

}  // namespace

#define PROBE extern "C" __attribute__((visibility("default")))

PROBE int probe_open(const void* bytes, std::size_t n) {
  edgeqdm::Table table;
  return static_cast<int>(edgeqdm::table_open(bytes, n, &table));
}

PROBE int probe_open_into_null(const void* bytes, std::size_t n) {
  return static_cast<int>(edgeqdm::table_open(bytes, n, nullptr));
}

// Whether a table that is refused leaves the one it was to be written to as it was.
PROBE int probe_keeps(const void* bytes, std::size_t n) {
  edgeqdm::Table table, before;
  std::memset(static_cast<void*>(&table), 0x5A, sizeof table);
  std::memcpy(static_cast<void*>(&before), &table, sizeof table);
  return edgeqdm::table_open(bytes, n, &table) != edgeqdm::TableStatus::ok &&
         std::memcmp(&before, &table, sizeof table) == 0;
}

PROBE int probe_row(const void* bytes, std::size_t n, std::size_t array, std::uint32_t step,
                    float* values, std::size_t n_values) {
  edgeqdm::Table table;
  const auto status = edgeqdm::table_open(bytes, n, &table);
  if (status != edgeqdm::TableStatus::ok) return -1;
  return static_cast<int>(edgeqdm::table_row(table, static_cast<edgeqdm::layout::Array>(array),
                                             step, values, n_values));
}

// The scalars in the order of the layout; conditioning sizes one by one.
PROBE int probe_scalars(const void* bytes, std::size_t n, double* values) {
  edgeqdm::Table t;
  const auto status = edgeqdm::table_open(bytes, n, &t);
  if (status != edgeqdm::TableStatus::ok) return static_cast<int>(status);
  const double found[] = {
      double(t.flags), double(t.steps), double(t.sample_history), double(t.output_history),
      double(t.channels), double(t.height), double(t.width), double(t.conditioning),
      double(t.labels), double(t.null_label), double(t.conditioning_rank),
      double(t.conditioning_size[0]), double(t.conditioning_size[1]),
      double(t.conditioning_size[2]), double(t.conditioning_size[3]), double(t.decoder),
      double(t.decoder_factor), double(t.label_names), double(t.guidance),
      double(t.initial_sigma), double(t.clip_limit), double(t.largest_share)};
  std::memcpy(values, found, sizeof found);
  return 0;
}

PROBE int probe_label(const void* bytes, std::size_t n, std::uint32_t label, char* text,
                      std::size_t size) {
  edgeqdm::Table table;
  if (edgeqdm::table_open(bytes, n, &table) != edgeqdm::TableStatus::ok) return -1;
  const char* name = nullptr;
  std::size_t length = 0;
  const auto status = edgeqdm::table_label_name(table, label, &name, &length);
  if (status == edgeqdm::TableStatus::ok && length < size) {
    std::memcpy(text, name, length);
    text[length] = '\0';
  }
  return static_cast<int>(status);
}

PROBE void probe_philox(const std::uint32_t* counter, std::uint64_t key, std::uint32_t* words) {
  const auto found =
      edgeqdm::philox4x32({counter[0], counter[1], counter[2], counter[3]}, key);
  std::memcpy(words, found.data(), 16);
}

PROBE void probe_normal(std::uint64_t seed, std::uint32_t stream, std::uint32_t image,
                        float* values, std::size_t n) {
  edgeqdm::standard_normal(seed, stream, image, values, n);
}

// Runs the solver on given outputs [S, B, ...]; `samples` [S, B, C, H, W].
PROBE int probe_replay(const void* bytes, std::size_t n, std::uint64_t seed, std::uint32_t n_images,
                       const float* outputs, float* samples) {
  edgeqdm::Table table;
  if (edgeqdm::table_open(bytes, n, &table) != edgeqdm::TableStatus::ok) return -1;
  edgeqdm::Solver solver(table, n_images);
  const std::size_t image = solver.size() / n_images;
  const std::size_t stride = table.has(edgeqdm::layout::flag_learned_variance) ? 2 * image : image;
  std::vector<float> noise(solver.size()), fed(solver.size());
  const auto draw = [&](std::uint32_t stream) {
    for (std::uint32_t k = 0; k < n_images; ++k) {
      edgeqdm::standard_normal(seed, stream, k, noise.data() + k * image, image);
    }
  };
  draw(edgeqdm::initial_stream);
  solver.start(noise.data());
  for (std::uint32_t step = 0; step < table.steps; ++step) {
    solver.feed(fed.data());
    if (solver.adds_noise()) draw(edgeqdm::step_stream(step));
    solver.advance(fed.data(), {outputs + step * n_images * stride, stride}, noise.data());
    std::memcpy(samples + step * solver.size(), solver.sample(), 4 * solver.size());
  }
  return 0;
}

// Draws images with the network called back; `samples` [B, C, H, W].
PROBE int probe_sample(const void* bytes, std::size_t n, const float* null_embedding,
                       std::size_t null_size, std::uint64_t seed, std::uint32_t first,
                       std::uint32_t n_images, const std::int64_t* labels, const float* embeddings,
                       Evaluate evaluate, float* samples, char* message, std::size_t size) {
  return status_of(
      [&] {
        edgeqdm::Table table;
        if (edgeqdm::table_open(bytes, n, &table) != edgeqdm::TableStatus::ok) {
          throw edgeqdm::Error(EDGEQDM_VERIFY, "table");
        }
        const std::vector<float> null_values(null_embedding, null_embedding + null_size);
        CalledBack network(table, evaluate);
        edgeqdm::Sampler sampler(table, null_values, network);
        edgeqdm::Draw draw;
        draw.seed = seed;
        draw.first_image = first;
        draw.n_images = n_images;
        draw.labels = labels;
        draw.embeddings = embeddings;
        sampler.begin(draw);
        while (sampler.steps_done() < table.steps) sampler.step();
        std::memcpy(samples, sampler.samples(), 4 * sampler.size());
      },
      message, size);
}

PROBE void probe_sha256(const unsigned char* bytes, std::size_t n, char* digits) {
  edgeqdm::Sha256 sha256;
  sha256.update(bytes, n / 2);
  sha256.update(bytes + n / 2, n - n / 2);
  std::strcpy(digits, sha256.hex().c_str());
}

PROBE int probe_json(const unsigned char* bytes, std::size_t n, char* message, std::size_t size) {
  return status_of([&] { edgeqdm::parse_json(bytes, n); }, message, size);
}

PROBE int probe_path(const char* path) { return edgeqdm::path_fault(path).empty() ? 0 : 1; }

// Values of a .npy file: their number in `*count`, at most `capacity` of them in `values`.
PROBE int probe_npy(const unsigned char* bytes, std::size_t n, float* values, std::size_t capacity,
                    std::size_t* count, char* message, std::size_t size) {
  return status_of(
      [&] {
        const auto tensor = edgeqdm::parse_npy(Bytes(bytes, bytes + n), "e.npy");
        *count = tensor.floats.size();
        std::memcpy(values, tensor.floats.data(), 4 * std::min(capacity, *count));
      },
      message, size);
}

// A tensor of a safetensors file as bytes of its float or integer values.
PROBE int probe_safetensors(const unsigned char* bytes, std::size_t n, const char* name,
                            unsigned char* values, std::size_t capacity, char* message,
                            std::size_t size) {
  return status_of(
      [&] {
        const auto tensors = edgeqdm::parse_safetensors(Bytes(bytes, bytes + n));
        const auto found = tensors.find(name);
        if (found == tensors.end()) return;
        const auto& tensor = found->second;
        const std::size_t floats = 4 * tensor.floats.size();
        std::memcpy(values, tensor.floats.data(), std::min(capacity, floats));
        std::memcpy(values, tensor.integers.data(),
                    std::min(capacity, 8 * tensor.integers.size()));
      },
      message, size);
}

// Pixels of samples [B, C, H, W], their sheet and its file; returns the file's size.
PROBE std::size_t probe_image(const void* bytes, std::size_t n, const float* samples,
                              std::size_t n_images, std::uint32_t columns, const char* path,
                              std::uint8_t* pixels, unsigned char* file, std::size_t capacity) {
  edgeqdm::Table table;
  if (edgeqdm::table_open(bytes, n, &table) != edgeqdm::TableStatus::ok) return 0;
  edgeqdm::decode(table, samples, n_images, pixels);
  const auto image =
      edgeqdm::sheet(pixels, edgeqdm::pixel_shape(table), n_images, columns);
  const Bytes data = edgeqdm::encode(image, path);
  std::memcpy(file, data.data(), std::min(capacity, data.size()));
  return data.size();
}
