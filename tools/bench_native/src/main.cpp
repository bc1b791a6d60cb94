// edgeqdm-bench: times the graphs of a kit, or a package, on this device.
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <set>
#include <stdexcept>
#include <string>

#include "bench.h"
#include "device.h"
#include "edgeqdm.h"
#include "error.h"
#include "files.h"
#include "json_text.h"
#include "kit.h"
#include "onnxruntime_graph.h"
#include "options.h"
#include "package.h"
#include "results.h"
#include "stopwatch.h"

namespace {

namespace bench = edgeqdm::bench;
using bench::quoted;
using edgeqdm::Error;
using edgeqdm::printable;

const std::string no_root;

void say(const std::string& line) {
  if (std::printf("%s\n", line.c_str()) < 0 || std::fflush(stdout) != 0) {
    throw Error(EDGEQDM_OUTPUT, "standard output cannot be written");
  }
}

// Each warning once.
class Warner {
 public:
  void warn(const bench::Reading& reading) {
    for (const std::string& text : bench::warnings(reading)) {
      if (told_.insert(text).second) std::fprintf(stderr, "warning: %s\n", text.c_str());
    }
  }

 private:
  std::set<std::string> told_;
};

// The fields that describe a measurement on this device, in the order of bench.py.
struct Setting {
  std::string device, runtime, clock, flags, environment;
};

Setting describe(const bench::Options& options, const bench::Cpus& cpus,
                 const bench::Reading& reading) {
  const bench::System system = bench::system_of_this_device();
  const bench::Processor found = bench::processor(no_root, system.machine);
  std::vector<std::string> flags;
  if (options.emulator) flags.emplace_back("emulator");
  if (bench::has_low_battery(reading)) flags.emplace_back("low_battery");
  Setting setting;
  setting.device = "{\"name\":" + quoted(options.name.empty() ? found.name : options.name) +
                   ",\"machine\":" + quoted(system.machine) + ",\"system\":" +
                   quoted(system.name) + ",\"features\":" + bench::quoted_list(found.features) +
                   "}";
  setting.runtime = "{\"name\":\"onnxruntime\",\"version\":" + quoted(bench::library_version()) +
                    "}";
  setting.clock = quoted(options.threads == 1 ? "thread_cpu" : "wall");
  setting.flags = bench::quoted_list(flags);
  setting.environment =
      "{\"tool\":" + quoted(std::string("edgeqdm-bench " EDGEQDM_VERSION)) + ",\"cpus\":" +
      bench::naturals_text({cpus.begin(), cpus.end()}) + ",\"max_khz\":" +
      bench::naturals_text(bench::highest_khz(no_root, cpus)) + ",\"governors\":" +
      bench::quoted_list(reading.governors) + "}";
  return setting;
}

std::string header_text(const bench::Options& options, const Setting& setting,
                        const std::string& kit_sha256) {
  return "{\"schema_version\":1,\"kit_sha256\":" + quoted(kit_sha256) + ",\"created\":" +
         quoted(bench::time_text()) + ",\"device\":" + setting.device + ",\"runtime\":" +
         setting.runtime + ",\"threads\":" + std::to_string(options.threads) +
         ",\"power_mode\":" + quoted(options.power_mode) + ",\"clock\":" + setting.clock +
         ",\"ci_target\":" + bench::number_text(bench::default_ci_target) + ",\"max_seconds\":" +
         bench::number_text(options.max_seconds) + ",\"flags\":" + setting.flags +
         ",\"seconds\":" + bench::number_text(options.seconds) + ",\"environment\":" +
         setting.environment + "}";
}

// environment-1.jsonl beside results-1.jsonl, environment-x.jsonl beside x.jsonl.
std::string environment_path(const std::string& results) {
  const std::size_t slash = results.rfind('/');
  const std::size_t start = slash == std::string::npos ? 0 : slash + 1;
  std::string name = results.substr(start);
  const std::string prefix = "results-";
  if (name.compare(0, prefix.size(), prefix) == 0) name.erase(0, prefix.size());
  return results.substr(0, start) + "environment-" + name;
}

std::string time_left(double seconds) {
  const auto whole = static_cast<long>(seconds + 0.5);
  return whole < 100 ? std::to_string(whole) + " s" : std::to_string((whole + 30) / 60) + " min";
}

// This machine, as the measurement sees it.
class ThisDevice final : public bench::Device {
 public:
  ThisDevice(const bench::Kit& kit, const bench::Options& options, const bench::Cpus& cpus,
             const std::string& environment)
      : kit_(kit), threads_(options.threads), cpus_(cpus), environment_(environment),
        stopwatch_(threads_ == 1 ? bench::Clock::thread_cpu : bench::Clock::wall) {}

  std::unique_ptr<bench::Evaluation> open(const bench::Graph& graph) override {
    return bench::open_graph(bench::graph_folder(kit_, graph.name), graph, threads_);
  }

  double timed(bench::Evaluation& evaluation) override {
    return stopwatch_.timed([&evaluation] { evaluation.run(); });
  }

  double now() override { return bench::seconds_now(CLOCK_MONOTONIC); }

  void checked(double reference_us) override {
    const bench::Reading reading = bench::read_device(no_root, cpus_);
    warner_.warn(reading);
    bench::append_line(environment_,
                       bench::reading_text(reading, reference_us, bench::time_text()));
  }

  void progress(std::size_t done, std::size_t total, bool timed) override {
    n_timed_ += timed ? 1 : 0;
    std::string line = std::to_string(done) + "/" + std::to_string(total);
    if (timed && done < total) {
      const double each = (now() - began_) / static_cast<double>(n_timed_);
      line += ", at most " + time_left(each * static_cast<double>(total - done)) + " left";
    }
    say(line);
  }

 private:
  const bench::Kit& kit_;
  const unsigned threads_;
  const bench::Cpus cpus_;
  const std::string environment_;
  const bench::Stopwatch stopwatch_;
  const double began_ = bench::seconds_now(CLOCK_MONOTONIC);
  std::size_t n_timed_ = 0;
  Warner warner_;
};

void run_kit(const bench::Options& options, const bench::Cpus& cpus) {
  const bench::Kit kit = bench::read_kit(options.folder);
  const std::string out = options.out.empty()
                              ? kit.folder + "/results-" + std::to_string(options.threads) +
                                    ".jsonl"
                              : options.out;
  const Setting setting = describe(options, cpus, bench::read_device(no_root, cpus));
  std::set<std::string> names;
  for (const bench::Graph& graph : kit.graphs) names.insert(graph.name);
  bench::Results results(out, header_text(options, setting, kit.sha256), names);
  bench::check_graphs(kit);
  const edgeqdm::Json& header = results.header();
  const bench::Limits limits{options.seconds,
                             bench::real(header.field("max_seconds"), "max_seconds"),
                             bench::real(header.field("ci_target"), "ci_target")};
  ThisDevice device(kit, options, cpus, environment_path(out));
  try {
    bench::Bench(kit, limits, results, device).run();
  } catch (const Error& error) {
    if (error.status() != EDGEQDM_CANCELLED) throw;
    throw Error(EDGEQDM_CANCELLED, "interrupted; the same command goes on");
  }
  say(out + ": done");
}

// Throws before anything is timed: afterwards the figures would be lost. Only a file that is made
// there shows that one can be.
void check_writable(const std::string& path) {
  const auto fail = [&path](int reason) {
    throw Error(EDGEQDM_OUTPUT, path + ": cannot be written (" + std::strerror(reason) +
                                    "); name another file with --out");
  };
  struct stat found;
  if (::stat(path.c_str(), &found) == 0 && S_ISDIR(found.st_mode)) fail(EISDIR);
  const std::size_t name = path.rfind('/') + 1;
  std::string trial = path.substr(0, name) + "." + path.substr(name) + ".XXXXXX";
  const int file = ::mkstemp(trial.data());
  if (file < 0) fail(errno);
  ::close(file);
  ::unlink(trial.c_str());
}

void run_package(const bench::Options& options, const bench::Cpus& cpus) {
  if (!options.out.empty()) check_writable(options.out);
  const bench::Reading before = bench::read_device(no_root, cpus);
  Warner().warn(before);
  const Setting setting = describe(options, cpus, before);
  const bench::Stopwatch stopwatch(options.threads == 1 ? bench::Clock::thread_cpu
                                                        : bench::Clock::wall);
  const auto phases = bench::time_package(
      options.folder, {options.seconds, options.max_seconds, options.threads}, stopwatch);
  const std::string text = "{\"package\":" + quoted(options.folder) + ",\"created\":" +
                           quoted(bench::time_text()) + ",\"device\":" + setting.device +
                           ",\"runtime\":" + setting.runtime + ",\"threads\":" +
                           std::to_string(options.threads) + ",\"power_mode\":" +
                           quoted(options.power_mode) + ",\"clock\":" + setting.clock +
                           ",\"flags\":" + setting.flags + ",\"environment\":" +
                           setting.environment + "," + bench::phases_text(phases) + "}";
  if (options.out.empty()) return say(text);
  edgeqdm::Bytes data(text.begin(), text.end());
  data.push_back('\n');
  edgeqdm::write_atomically(options.out, data);
}

void run(const bench::Options& options) {
  const bench::Cpus allowed = bench::allowed_cpus();
  const bool chosen = !options.cpus.empty();
  const bench::Cpus cpus =
      chosen ? options.cpus : bench::fastest_cpus(no_root, allowed, options.threads);
  // Threads beyond the CPUs of this device are an error of whoever asks for both, else a choice.
  bench::pin(cpus, allowed, chosen ? options.threads : 1);
  (options.package ? run_package : run_kit)(options, cpus);
}

int fail(int status, const std::string& message) {
  std::fprintf(stderr, "error: %s\n", printable(message).c_str());
  return status;
}

}  // namespace

int main(int n, char** values) {
  edgeqdm::reserve_standard_streams();
  bench::set_signals();
  try {
    const bench::Options options = bench::parse_options(n, values);
    if (options.help) {
      std::fputs(bench::help_text, stdout);
    } else if (options.version) {
      say(EDGEQDM_VERSION);
    } else {
      // Read where the library is opened, by the package's runtime as well.
      if (!options.library.empty()) setenv("EDGEQDM_ONNXRUNTIME", options.library.c_str(), 1);
      run(options);
    }
  } catch (const Error& error) {
    return fail(error.status(), error.what());
  } catch (const std::bad_alloc&) {
    return fail(EDGEQDM_RESOURCE, "out of memory; end other programs and run again");
  } catch (const std::length_error&) {
    return fail(EDGEQDM_RESOURCE, "out of memory; end other programs and run again");
  } catch (const std::exception& error) {
    return fail(EDGEQDM_INTERNAL, std::string("internal: ") + error.what());
  }
  if (std::fflush(stdout) != 0) return fail(EDGEQDM_OUTPUT, "standard output cannot be written");
  return EDGEQDM_OK;
}
