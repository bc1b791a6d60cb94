#include "bench.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "python_random.h"

namespace edgeqdm::bench {
namespace {

double seconds_of(const Samples& us) { return std::accumulate(us.begin(), us.end(), 0.0) / 1e6; }

Samples joined(const Samples& first, const Samples& second) {
  Samples all = first;
  all.insert(all.end(), second.begin(), second.end());
  return all;
}

}  // namespace

Bench::Bench(const Kit& kit, const Limits& limits, Results& results, Device& device)
    : kit_(kit), limits_(limits), results_(results), device_(device), checked_(-INFINITY) {
  std::map<Layers, std::string> alone;
  for (const Graph& graph : kit.graphs) {
    if (graph.role == "phase" && !graph.among) alone[graph.layers] = graph.name;
  }
  for (const Graph& graph : kit.graphs) {
    beside_[graph.name] = graph.role == "phase" ? alone.at(graph.layers) : graph.name;
  }
}

void Bench::run() {
  std::vector<std::string> names;
  for (const Graph& graph : kit_.graphs) {
    if (graph.name != kit_.reference) names.push_back(graph.name);
  }
  const std::size_t total = names.size() * (n_rounds + 1);
  const std::uint64_t before = results_.count(kit_.reference);
  std::size_t done = 0;
  for (std::uint64_t turn = 0; turn <= n_rounds; ++turn) {
    sort(names, turn);
    for (const std::string& name : names) {
      const bool missing = !results_.has(name, turn) && !enough(name, turn);
      if (missing) {
        check_reference();
        results_.keep(name, turn, sample(name, turn));
      }
      device_.progress(++done, total, missing);
    }
  }
  // Before and after, at least; a finished kit is left as it is.
  const std::uint64_t n_checks = results_.count(kit_.reference);
  if (n_checks > before || n_checks < 2) {
    checked_ = -INFINITY;
    check_reference();
  }
}

// Another order in every round, so that what drifts does not always meet the same graphs.
void Bench::sort(std::vector<std::string>& names, std::uint64_t turn) const {
  PythonRandom(static_cast<std::uint32_t>(turn)).shuffle(names);
  std::map<std::string, std::size_t> place;
  for (std::size_t k = 0; k < names.size(); ++k) place[names[k]] = k;
  const auto key = [&](const std::string& name) {
    return std::make_pair(place.at(beside_.at(name)), place.at(name));
  };
  std::sort(names.begin(), names.end(),
            [&key](const std::string& a, const std::string& b) { return key(a) < key(b); });
}

// The last round is for graphs whose median is not known well enough.
bool Bench::enough(const std::string& name, std::uint64_t turn) const {
  if (turn < n_rounds) return false;
  return is_last_done(results_.samples(name), {});
}

bool Bench::is_last_done(const Samples& earlier, const Samples& found) const {
  const Samples all = joined(earlier, found);
  return finished(all, limits_.ci_target) || seconds_of(all) >= limits_.max_seconds;
}

void Bench::check_reference() {
  if (device_.now() - checked_ < reference_every_s) return;
  const std::unique_ptr<Evaluation> evaluation = device_.open(kit_.graph(kit_.reference));
  evaluation->run();
  const Samples us = block(*evaluation);
  results_.keep(kit_.reference, results_.next_round(kit_.reference), us);
  device_.checked(median(us));
  checked_ = device_.now();
}

Samples Bench::sample(const std::string& name, std::uint64_t turn) {
  const std::unique_ptr<Evaluation> evaluation = device_.open(kit_.graph(name));
  warm_up(*evaluation);
  const Samples earlier = results_.samples(name);
  Samples found;
  while (found.size() < max_runs) {
    found = joined(found, block(*evaluation));
    const bool long_enough = found.size() >= min_runs / n_rounds &&
                             seconds_of(found) >= limits_.seconds / n_rounds;
    if (turn < n_rounds ? long_enough : is_last_done(earlier, found)) break;
  }
  return found;
}

void Bench::warm_up(Evaluation& evaluation) {
  const double began = device_.now();
  double previous = -1.0;
  for (int k = 0; k < 20; ++k) {
    const double found = median(block(evaluation));
    const bool steady = previous >= 0 && std::fabs(found - previous) <= 0.02 * previous;
    previous = found;
    const double spent = device_.now() - began;
    if ((steady && spent >= warm_up_seconds) || spent >= 10 * warm_up_seconds) return;
  }
}

Samples Bench::block(Evaluation& evaluation) {
  Samples us;
  for (std::size_t k = 0; k < block_runs; ++k) us.push_back(device_.timed(evaluation));
  return us;
}

}  // namespace edgeqdm::bench
