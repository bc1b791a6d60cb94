// What a step of the C++ runtime takes beside its network: the sampler with a network that does
// nothing.
//
//   host_loop SCHEDULE.BIN IMAGES ROUNDS     prints CPU microseconds of a step, the median
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <vector>

#include "edgeqdm.h"
#include "network.h"
#include "sampler.h"

namespace edgeqdm {
namespace {

class NoNetwork final : public Network {
 public:
  using Network::Network;
  void run(std::uint32_t) override {}

 protected:
  void bind() override {}
};

double cpu_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

}  // namespace
}  // namespace edgeqdm

int main(int n, char** values) {
  if (n != 4) return 2;
  std::ifstream file(values[1], std::ios::binary);
  std::vector<unsigned char> bytes{std::istreambuf_iterator<char>(file), {}};
  edgeqdm::Table table{};
  if (edgeqdm::table_open(bytes.data(), bytes.size(), &table) != edgeqdm::TableStatus::ok) return 1;
  edgeqdm::NoNetwork network(table);
  const std::vector<float> null_embedding;
  edgeqdm::Sampler sampler(table, null_embedding, network);
  edgeqdm::Draw draw;
  draw.n_images = static_cast<std::uint32_t>(std::atoi(values[2]));
  const std::vector<std::int64_t> labels(draw.n_images, 0);
  draw.labels = labels.data();
  std::vector<double> seconds;
  for (int round = 0; round < std::atoi(values[3]); ++round) {
    sampler.begin(draw);
    const double began = edgeqdm::cpu_seconds();
    for (std::uint32_t step = 0; step < table.steps; ++step) sampler.step();
    seconds.push_back((edgeqdm::cpu_seconds() - began) / table.steps);
  }
  std::sort(seconds.begin(), seconds.end());
  std::printf("%.3f\n", 1e6 * seconds[seconds.size() / 2]);
  return 0;
}
