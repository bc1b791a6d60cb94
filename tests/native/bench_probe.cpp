// What the benchmark tool decides, on made-up times: tests compare it with the Python tool.
//
//   bench-probe intervals           of lines of numbers on stdin: interval, median, p25, the end
//   bench-probe measure KIT OUT HEADER SECONDS MAX_SECONDS
//                                   times the kit with times out of a formula
//   bench-probe processor ROOT MACHINE
//   bench-probe reading ROOT CPUS
//   bench-probe fastest ROOT ALLOWED THREADS
#include <cstdio>
#include <iostream>
#include <map>
#include <sstream>
#include <string>

#include "bench.h"
#include "device.h"
#include "error.h"
#include "json_text.h"
#include "kit.h"
#include "protocol.h"
#include "results.h"

namespace {

using namespace edgeqdm::bench;

// Times that depend on the graph and on how often it was evaluated; the clock goes on by them.
struct World {
  std::uint64_t evaluate(const std::string& name) {
    const std::uint64_t graph = std::stoull(name);
    const std::uint64_t word = (graph * 7919 + count[name]++) * 2654435761u % 4294967296u;
    // 100 us, 200 us, ... and up to some percent more, of every third graph many.
    const std::uint64_t base = std::uint64_t{100} << graph;
    const std::uint64_t percent = (graph * 5 + 3) % 14 * (graph % 3 == 2 ? 60u : 1u);
    const std::uint64_t us = base + base * percent * (word >> 12) / 100 / 1048576;
    now += static_cast<double>(us) / 1e6;
    return us;
  }

  std::map<std::string, std::uint64_t> count;
  double now = 1000.0;
};

class MadeUpGraph final : public Evaluation {
 public:
  MadeUpGraph(World& world, std::string name) : world_(world), name_(std::move(name)) {}
  void run() override { last_us = world_.evaluate(name_); }

  std::uint64_t last_us = 0;

 private:
  World& world_;
  const std::string name_;
};

class MadeUp final : public Device {
 public:
  std::unique_ptr<Evaluation> open(const Graph& graph) override {
    return std::make_unique<MadeUpGraph>(world_, graph.name);
  }

  double timed(Evaluation& evaluation) override {
    evaluation.run();
    return static_cast<double>(dynamic_cast<MadeUpGraph&>(evaluation).last_us);
  }

  double now() override { return world_.now; }
  void checked(double) override {}
  void progress(std::size_t done, std::size_t total, bool) override {
    std::printf("%zu/%zu\n", done, total);
  }

 private:
  World world_;
};

void print_intervals() {
  for (std::string line; std::getline(std::cin, line);) {
    Samples samples;
    std::istringstream stream(line);
    for (double value = 0; stream >> value;) samples.push_back(value);
    const auto [low, high] = median_interval(samples);
    std::printf("%s\n", numbers_text({low, high, median(samples), percentile(samples, 0.25),
                                      finished(samples, default_ci_target) ? 1.0 : 0.0})
                            .c_str());
  }
}

void measure(char** values) {
  const Kit kit = read_kit(values[0]);
  std::set<std::string> names;
  for (const Graph& graph : kit.graphs) names.insert(graph.name);
  Results results(values[1], values[2], names);
  MadeUp device;
  const Limits limits{std::stod(values[3]), std::stod(values[4]), default_ci_target};
  Bench(kit, limits, results, device).run();
}

void print_processor(const std::string& root, const std::string& machine) {
  const Processor found = processor(root, machine);
  std::printf("[%s,%s]\n", quoted(found.name).c_str(), quoted_list(found.features).c_str());
}

void print_reading(const std::string& root, const std::string& cpus) {
  const Reading reading = read_device(root, parse_cpus(cpus));
  std::printf("%s\n%s\n%d\n", reading_text(reading, 1.5, "now").c_str(),
              quoted_list(warnings(reading)).c_str(), has_low_battery(reading) ? 1 : 0);
}

void print_fastest(const std::string& root, const std::string& allowed, const char* threads) {
  const Cpus found =
      fastest_cpus(root, parse_cpus(allowed), static_cast<unsigned>(std::stoul(threads)));
  std::printf("%s %s\n", naturals_text({found.begin(), found.end()}).c_str(),
              naturals_text(highest_khz(root, found)).c_str());
}

}  // namespace

int main(int n, char** values) {
  const std::string what = n > 1 ? values[1] : "";
  try {
    if (what == "intervals") print_intervals();
    if (what == "measure" && n == 7) measure(values + 2);
    if (what == "processor" && n == 4) print_processor(values[2], values[3]);
    if (what == "reading" && n == 4) print_reading(values[2], values[3]);
    if (what == "fastest" && n == 5) print_fastest(values[2], values[3], values[4]);
  } catch (const edgeqdm::Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return error.status();
  }
  return 0;
}
