// Everything of a package that is parsed before it is trusted, on any bytes: built with the address
// and undefined-behaviour sanitizers and -DEDGEQDM_FUZZ_NO_CRC. With libFuzzer (clang
// -fsanitize=fuzzer, -DEDGEQDM_LIBFUZZER) that makes the inputs, else the driver below.
//
//   fuzz_package SECONDS SEED FILE...    mutates the files; prints how many inputs were tried
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <vector>

#include "error.h"
#include "manifest.h"
#include "solver.h"
#include "table.h"
#include "tensors.h"

namespace {

using edgeqdm::Bytes;

template <typename Parse>
void expect_error_or_result(const Parse& parse) {
  try {
    parse();
  } catch (const edgeqdm::Error& error) {
    if (error.what()[0] == '\0') std::abort();
  }
}

void open_table(const Bytes& data) {
  edgeqdm::Table table;
  if (edgeqdm::table_open(data.data(), data.size(), &table) != edgeqdm::TableStatus::ok) return;
  std::vector<float> row;
  for (std::size_t k = 0; k < edgeqdm::layout::n_arrays; ++k) {
    const auto array = static_cast<edgeqdm::layout::Array>(k);
    row.resize(table.columns[k]);
    for (std::uint32_t step = 0; step <= table.steps; ++step) {
      edgeqdm::table_row(table, array, step, row.data(), row.size());
    }
  }
  const char* name = nullptr;
  std::size_t length = 0;
  for (std::uint32_t label = 0; label <= table.label_names; ++label) {
    edgeqdm::table_label_name(table, label, &name, &length);
  }
  const std::uint64_t image = std::uint64_t{table.channels} * table.height * table.width;
  if (image * (table.sample_history + table.output_history) > 10000 || table.steps > 8) return;
  edgeqdm::Solver solver(table, 1);
  const std::vector<float> output(2 * image, 0.5f);
  solver.start(output.data());
  for (std::uint32_t step = 0; step < table.steps; ++step) {
    solver.advance(output.data(), {output.data(), 2 * image}, output.data());
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t n) {
  const Bytes data(bytes, bytes + n);
  open_table(data);
  expect_error_or_result([&] { edgeqdm::parse_manifest(data); });
  expect_error_or_result([&] { edgeqdm::parse_safetensors(data); });
  expect_error_or_result([&] { edgeqdm::parse_npy(data, "fuzz"); });
  return 0;
}

#ifndef EDGEQDM_LIBFUZZER

namespace {

class Mutator {
 public:
  explicit Mutator(std::uint64_t seed) : state_(seed) {}

  // SplitMix64, Steele et al. 2014.
  std::uint64_t draw(std::uint64_t below) {
    state_ += 0x9E3779B97F4A7C15u;
    std::uint64_t word = state_;
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9u;
    word = (word ^ word >> 27) * 0x94D049BB133111EBu;
    return (word ^ word >> 31) % below;
  }

  Bytes mutate(Bytes data) {
    for (std::uint64_t n = 1 + draw(4); n > 0 && !data.empty(); --n) change(data);
    // The size in a table's header follows, half of the time, or no other check would be reached.
    if (data.size() >= 24 && data[0] == edgeqdm::layout::magic[0] && draw(2) == 0) {
      for (int k = 0; k < 8; ++k) {
        data[edgeqdm::layout::size_offset + static_cast<std::size_t>(k)] =
            static_cast<unsigned char>(std::uint64_t{data.size()} >> 8 * k);
      }
    }
    return data;
  }

 private:
  void change(Bytes& data) {
    static constexpr unsigned char telling[] = {0, 1, 0x7F, 0x80, 0xFF, '"', '{', '[', '9', '-'};
    const auto at = static_cast<std::ptrdiff_t>(draw(data.size()));
    unsigned char& byte = data[static_cast<std::size_t>(at)];
    switch (draw(5)) {
      case 0: byte = static_cast<unsigned char>(byte ^ (1u << draw(8))); break;
      case 1: byte = telling[draw(sizeof telling)]; break;
      case 2: data.resize(static_cast<std::size_t>(at)); break;
      case 3: data.insert(data.begin() + at, draw(9), telling[draw(sizeof telling)]); break;
      default: data.erase(data.begin() + at); break;
    }
  }

  std::uint64_t state_;
};

}  // namespace

int main(int n, char** values) {
  if (n < 4) return 2;
  std::vector<Bytes> corpus;
  for (int k = 3; k < n; ++k) {
    std::ifstream file(values[k], std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    LLVMFuzzerTestOneInput(corpus.back().data(), corpus.back().size());
  }
  Mutator mutator(std::strtoull(values[2], nullptr, 10));
  const auto end = std::chrono::steady_clock::now() +
                   std::chrono::duration<double>(std::strtod(values[1], nullptr));
  unsigned long tried = 0;
  for (; std::chrono::steady_clock::now() < end; ++tried) {
    const Bytes data = mutator.mutate(corpus[mutator.draw(corpus.size())]);
    LLVMFuzzerTestOneInput(data.data(), data.size());
  }
  std::printf("%lu\n", tried);
  return 0;
}

#endif
