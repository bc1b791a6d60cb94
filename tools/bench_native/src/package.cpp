#include "package.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <numeric>

#include "error.h"
#include "files.h"
#include "json.h"
#include "json_text.h"
#include "manifest.h"
#include "network.h"
#include "philox.h"
#include "python_random.h"
#include "sampler.h"
#include "table.h"
#include "tensors.h"

namespace edgeqdm::bench {
namespace {

constexpr std::uint64_t max_table_bytes = std::uint64_t{1} << 28;
constexpr std::uint64_t max_tensors_bytes = std::uint64_t{1} << 32;
// A whole step varies more than one operation, and fewer figures hang on it.
constexpr double ci_target = 0.02;
// Of evaluations after others have run, as in edgeqdm/bench/latency.py: a sampler finds the caches
// as it left them, not as another phase did.
constexpr double warm_seconds = 0.01;

// What `work` gives; what it says of a damaged file begins with its path.
template <typename Work>
auto named(const std::string& path, const Work& work) {
  try {
    return work();
  } catch (const Error& error) {
    if (error.status() != EDGEQDM_VERIFY) throw;
    throw Error(EDGEQDM_VERIFY, path + ": " + error.what());
  }
}

void require(const std::string& folder, const Manifest& manifest, const char* name) {
  if (manifest.files.count(name) != 0) return;
  throw Error(EDGEQDM_VERIFY,
              folder + "/" + name + ": not in the manifest; emit the package again");
}

Bytes read_part(const std::string& folder, const Manifest& manifest, const char* name,
                std::uint64_t limit) {
  require(folder, manifest, name);
  return read_file(folder + "/" + name, limit, EDGEQDM_VERIFY);
}

Manifest checked_manifest(const std::string& folder) {
  if (::access(folder.c_str(), F_OK) != 0) {
    throw Error(EDGEQDM_INPUT,
                folder + ": " + std::strerror(errno) + "; name the folder of a package");
  }
  if (::access((folder + "/manifest.json").c_str(), F_OK) != 0) {
    throw Error(EDGEQDM_INPUT, folder + " holds no manifest.json; name a package, or leave "
                                        "--package out for a kit");
  }
  try {
    return check_package(folder);
  } catch (const Error& error) {
    throw Error(error.status(), folder + ": " + error.what());
  }
}

// First steps of the phases, ascending from 0.
std::vector<std::uint32_t> parse_starts(const Bytes& data, std::uint32_t steps) {
  std::vector<std::uint32_t> starts;
  const Json document = parse_json(data.data(), data.size());
  for (const Json& phase : document.field("phases").items) {
    const std::uint64_t start = phase.field("start").natural("start");
    const bool follows = starts.empty() ? start == 0 : start > starts.back();
    if (!follows || start >= steps) throw Error(EDGEQDM_VERIFY, "phases do not follow each other");
    starts.push_back(static_cast<std::uint32_t>(start));
  }
  if (starts.empty()) throw Error(EDGEQDM_VERIFY, "no phases");
  return starts;
}

// A package that is open, and one conditioning for it.
class Package {
 public:
  Package(const std::string& folder, unsigned threads) {
    const Manifest manifest = checked_manifest(folder);
    table_bytes_ = read_part(folder, manifest, "schedule.bin", max_table_bytes);
    const TableStatus status = table_open(table_bytes_.data(), table_bytes_.size(), &table_);
    if (status != TableStatus::ok) {
      throw Error(EDGEQDM_VERIFY, folder + "/schedule.bin: " + table_status_text(status));
    }
    read_starts(folder, manifest);
    read_null(folder, manifest);
    ModelSource source;
    for (const auto& [start, name] : find_graphs(manifest)) {
      source.paths[start] = folder + "/" + name;
    }
    if (source.paths.empty()) require(folder, manifest, "model.onnx");
    network_ = named(folder, [&] { return open(source, threads); });
    prepare();
  }

  std::vector<PhaseTime> phases() const {
    std::vector<PhaseTime> found;
    for (std::size_t k = 0; k < starts_.size(); ++k) {
      const std::uint32_t stop = k + 1 < starts_.size() ? starts_[k + 1] : table_.steps;
      found.push_back({starts_[k], stop, {}});
    }
    return found;
  }

  void evaluate(std::uint32_t step) { sampler_->predict(x_.data(), step); }

 private:
  void read_starts(const std::string& folder, const Manifest& manifest) {
    const Bytes plan = read_part(folder, manifest, "plan.json", max_json_bytes);
    starts_ = named(folder + "/plan.json", [&] { return parse_starts(plan, table_.steps); });
  }

  void read_null(const std::string& folder, const Manifest& manifest) {
    const char* name = "conditioning.safetensors";
    if (manifest.files.count(name) == 0) return;
    const Bytes data = read_part(folder, manifest, name, max_tensors_bytes);
    null_ = named(folder + "/" + name, [&] { return parse_safetensors(data)["null"].floats; });
    if (table_.conditioning == layout::conditioning_embedding &&
        null_.size() == conditioning_size(table_)) {
      return;
    }
    throw Error(EDGEQDM_VERIFY, folder + "/" + name + ": does not fit schedule.bin");
  }

  std::unique_ptr<Network> open(const ModelSource& source, unsigned threads) const {
    NetworkOptions options;
    options.threads = static_cast<int>(threads);
    return open_network(source, table_, options);
  }

  void prepare() {
    sampler_ = std::make_unique<Sampler>(table_, null_, *network_);
    x_.resize(std::size_t{table_.channels} * table_.height * table_.width);
    standard_normal(0, initial_stream, 0, x_.data(), x_.size());
    std::vector<float> embedding(conditioning_size(table_));
    standard_normal(0, step_stream(0), 0, embedding.data(), embedding.size());
    const std::int64_t label = 0;
    Draw draw;
    draw.n_images = 1;
    if (table_.conditioning == layout::conditioning_label) draw.labels = &label;
    if (table_.conditioning == layout::conditioning_embedding) draw.embeddings = embedding.data();
    sampler_->condition(draw);
  }

  Bytes table_bytes_;
  Table table_{};
  std::vector<std::uint32_t> starts_;
  std::vector<float> null_;
  std::unique_ptr<Network> network_;
  std::unique_ptr<Sampler> sampler_;
  std::vector<float> x_;
};

double time_once(Package& package, const PhaseTime& phase, const Stopwatch& stopwatch) {
  const auto evaluate = [&] { package.evaluate((phase.start + phase.stop) / 2); };
  const double began = stopwatch.now();
  do {
    stopwatch.timed(evaluate);
  } while (stopwatch.now() - began < warm_seconds);
  return stopwatch.timed(evaluate);
}

// Warm-up counts: of short phases it is nearly all there is.
bool are_done(const std::vector<PhaseTime>& phases, const PackageLimits& limits, double spent) {
  const double each = spent / static_cast<double>(phases.size());
  const bool settled = std::all_of(phases.begin(), phases.end(), [](const PhaseTime& phase) {
    return finished(phase.us, ci_target);
  });
  const bool full = phases.front().us.size() >= max_runs || each >= limits.max_seconds;
  return full || (settled && each >= limits.seconds);
}

double weighted(const std::vector<PhaseTime>& phases, double share) {
  double sum = 0.0;
  for (const PhaseTime& phase : phases) {
    sum += (phase.stop - phase.start) * percentile(phase.us, share);
  }
  return sum / phases.back().stop;
}

}  // namespace

std::vector<PhaseTime> time_package(const std::string& folder, const PackageLimits& limits,
                                    const Stopwatch& stopwatch) {
  Package package(folder, limits.threads);
  std::vector<PhaseTime> phases = package.phases();
  std::vector<std::size_t> order(phases.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  PythonRandom random(0);
  const double began = stopwatch.now();
  // All of them as often as the one that needs it most: what drifts meets them alike.
  do {
    for (std::size_t k = 0; k < block_runs; ++k) {
      random.shuffle(order);
      for (std::size_t p : order) {
        phases[p].us.push_back(time_once(package, phases[p], stopwatch));
      }
    }
  } while (!are_done(phases, limits, stopwatch.now() - began));
  return phases;
}

std::string phases_text(const std::vector<PhaseTime>& phases) {
  std::string list;
  for (const PhaseTime& phase : phases) {
    const auto [low, high] = median_interval(phase.us);
    list += (list.empty() ? "" : ",") + std::string("{\"start\":") + std::to_string(phase.start) +
            ",\"stop\":" + std::to_string(phase.stop) + ",\"n\":" +
            std::to_string(phase.us.size()) + ",\"p25_us\":" +
            number_text(percentile(phase.us, 0.25)) + ",\"median_us\":" +
            number_text(median(phase.us)) + ",\"ci95_us\":" + numbers_text({low, high}) + "}";
  }
  return "\"steps\":" + std::to_string(phases.back().stop) + ",\"p25_us_per_step\":" +
         number_text(weighted(phases, 0.25)) + ",\"median_us_per_step\":" +
         number_text(weighted(phases, 0.5)) + ",\"phases\":[" + list + "]";
}

}  // namespace edgeqdm::bench
