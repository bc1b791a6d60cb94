// The measurement itself: order, warm-up, blocks, stop rule and reference of bench.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kit.h"
#include "protocol.h"
#include "results.h"

namespace edgeqdm::bench {

// A graph that is ready to be evaluated.
class Evaluation {
 public:
  virtual ~Evaluation() = default;
  // Once. Throws Error.
  virtual void run() = 0;
};

// What the measurement sees of the world.
class Device {
 public:
  virtual ~Device() = default;
  virtual std::unique_ptr<Evaluation> open(const Graph& graph) = 0;
  // Microseconds of one evaluation.
  virtual double timed(Evaluation& evaluation) = 0;
  // Seconds since some moment.
  virtual double now() = 0;
  // Told of every check of the reference graph, with its median.
  virtual void checked(double reference_us) = 0;
  // Told of every graph in every round; `timed` says whether it had to be timed.
  virtual void progress(std::size_t done, std::size_t total, bool timed) = 0;
};

struct Limits {
  double seconds;      // least per graph
  double max_seconds;  // most per graph
  double ci_target;
};

class Bench {
 public:
  // All of them must outlive it.
  Bench(const Kit& kit, const Limits& limits, Results& results, Device& device);

  // Takes the samples that are missing.
  void run();

 private:
  void sort(std::vector<std::string>& names, std::uint64_t turn) const;
  bool enough(const std::string& name, std::uint64_t turn) const;
  void check_reference();
  Samples sample(const std::string& name, std::uint64_t turn);
  bool is_last_done(const Samples& earlier, const Samples& found) const;
  void warm_up(Evaluation& evaluation);
  Samples block(Evaluation& evaluation);

  const Kit& kit_;
  const Limits limits_;
  Results& results_;
  Device& device_;
  // Next to each other: what tells them apart is little beside what minutes change.
  std::map<std::string, std::string> beside_;
  double checked_;
};

}  // namespace edgeqdm::bench
