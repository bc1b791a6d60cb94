#include "self_test.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "error.h"
#include "philox.h"
#include "tensors.h"

namespace edgeqdm {
namespace {

// Bounds and seed of playback.py, with their reasons there.
constexpr double golden_share = 1.5;
constexpr double float_noise = 1e-5;
constexpr double sampler_tolerance = 1e-4;
constexpr std::uint64_t golden_seed = 0x5EED;

struct Golden {
  std::uint32_t n_images;
  std::size_t sample_size;  // of a batch
  std::size_t output_size;
  std::vector<float> initial, inputs, outputs, samples;
  Tensor conditioning;
};

[[noreturn]] void refuse(const std::string& reason) {
  throw Error(EDGEQDM_VERIFY, "golden.safetensors: " + reason);
}

std::vector<float> take(std::map<std::string, Tensor>& tensors, const char* name,
                        std::uint64_t size) {
  std::vector<float> values = std::move(tensors[name].floats);
  if (values.size() != size) refuse(std::string(name) + " is missing or has a wrong size");
  return values;
}

Golden read_golden(const Table& table, const Bytes& data) {
  std::map<std::string, Tensor> tensors;
  try {
    tensors = parse_safetensors(data);
  } catch (const Error& error) {
    refuse(std::string("not a readable safetensors file: ") + error.what());
  }
  Golden golden;
  const std::size_t image = std::size_t{table.channels} * table.height * table.width;
  const std::size_t n_images = tensors["initial"].floats.size() / image;
  if (n_images == 0 || n_images > 1024) refuse("initial is missing or has a wrong size");
  golden.n_images = static_cast<std::uint32_t>(n_images);
  golden.sample_size = n_images * image;
  golden.output_size = golden.sample_size * (table.has(layout::flag_learned_variance) ? 2u : 1u);
  const std::uint64_t steps = table.steps;
  golden.initial = take(tensors, "initial", golden.sample_size);
  golden.inputs = take(tensors, "inputs", steps * golden.sample_size);
  golden.outputs = take(tensors, "outputs", steps * golden.output_size);
  golden.samples = take(tensors, "samples", steps * golden.sample_size);
  golden.conditioning = std::move(tensors["conditioning"]);
  const std::size_t wanted = n_images * conditioning_size(table);
  const bool label = table.conditioning == layout::conditioning_label;
  const bool embedding = table.conditioning == layout::conditioning_embedding;
  if (golden.conditioning.integers.size() != (label ? wanted : 0) ||
      golden.conditioning.floats.size() != (embedding ? wanted : 0)) {
    refuse("conditioning is missing or has a wrong size");
  }
  return golden;
}

double rms(const float* values, const float* expected, std::size_t n) {
  double sum = 0.0;
  for (std::size_t k = 0; k < n; ++k) {
    const double difference =
        static_cast<double>(values[k]) - (expected == nullptr ? 0.0 : double{expected[k]});
    sum += difference * difference;
  }
  return std::sqrt(sum / static_cast<double>(n));
}

std::vector<double> replay_network(const Table& table, Sampler& sampler, const Golden& golden) {
  Draw draw;
  draw.n_images = golden.n_images;
  if (!golden.conditioning.integers.empty()) draw.labels = golden.conditioning.integers.data();
  if (!golden.conditioning.floats.empty()) draw.embeddings = golden.conditioning.floats.data();
  sampler.condition(draw);
  std::vector<double> deviation;
  for (std::uint32_t step = 0; step < table.steps; ++step) {
    const Output found = sampler.predict(golden.inputs.data() + step * golden.sample_size, step);
    const float* expected = golden.outputs.data() + step * golden.output_size;
    float noise = 0.0f;
    table_value(table, layout::golden_noise_rms, step, &noise);
    const double least = float_noise * rms(expected, nullptr, golden.output_size);
    const double unit = std::max({double{noise}, least, 1e-30});
    deviation.push_back(rms(found.values, expected, golden.output_size) / unit);
  }
  return deviation;
}

// Largest difference; infinity where one is NaN, which no comparison would show.
double largest(const float* values, const float* expected, std::size_t n) {
  double worst = 0.0;
  for (std::size_t k = 0; k < n; ++k) {
    const double off = std::fabs(double{values[k]} - double{expected[k]});
    if (!(off <= worst)) worst = std::isnan(off) ? std::numeric_limits<double>::infinity() : off;
  }
  return worst;
}

void draw_noise(const Table& table, std::uint32_t stream, std::vector<float>& noise) {
  const std::size_t image = std::size_t{table.channels} * table.height * table.width;
  for (std::size_t k = 0; k < noise.size() / image; ++k) {
    standard_normal(golden_seed, stream, static_cast<std::uint32_t>(k), noise.data() + k * image,
                    image);
  }
}

double replay_sampler(const Table& table, const Golden& golden) {
  std::vector<float> noise(golden.sample_size), fed(golden.sample_size);
  draw_noise(table, initial_stream, noise);
  double worst = largest(noise.data(), golden.initial.data(), noise.size());
  Solver solver(table, golden.n_images);
  solver.start(noise.data());
  for (std::uint32_t step = 0; step < table.steps; ++step) {
    solver.feed(fed.data());
    if (solver.adds_noise()) draw_noise(table, step_stream(step), noise);
    const float* output = golden.outputs.data() + step * golden.output_size;
    solver.advance(fed.data(), {output, golden.output_size / golden.n_images}, noise.data());
    const float* expected = golden.samples.data() + step * golden.sample_size;
    worst = std::max(worst, largest(solver.sample(), expected, golden.sample_size));
  }
  const std::vector<float> zeros(golden.samples.size());
  return worst / std::max(1.0, largest(golden.samples.data(), zeros.data(), zeros.size()));
}

}  // namespace

SelfTest self_test(const Table& table, Sampler& sampler, const Bytes& data) {
  const Golden golden = read_golden(table, data);
  SelfTest result;
  result.deviation = replay_network(table, sampler, golden);
  result.sampler = replay_sampler(table, golden);
  result.passed = result.sampler <= sampler_tolerance &&
                  std::all_of(result.deviation.begin(), result.deviation.end(),
                              [](double deviation) { return deviation <= golden_share; });
  return result;
}

}  // namespace edgeqdm
