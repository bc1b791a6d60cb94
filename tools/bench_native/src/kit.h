// kit.json and the graphs it lists.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace edgeqdm::bench {

struct Input {
  std::string name;
  bool integer;  // zeros, else standard normal values
  std::vector<std::int64_t> shape;
  std::size_t size;  // product of the shape
};

// Layers and precisions, less those in fp32, which may as well be absent.
using Layers = std::set<std::pair<std::string, std::string>>;

struct Graph {
  std::string name;  // four digits: the folder below graphs/
  std::string role;
  std::map<std::string, std::string> files;  // SHA-256 by path
  std::vector<Input> inputs;
  Layers layers;
  bool among;  // it holds another phase, too
};

struct Kit {
  std::string folder;
  std::string sha256;  // of kit.json
  std::vector<Graph> graphs;
  std::string reference;  // name of the graph of the fixed product

  const Graph& graph(const std::string& name) const;
};

// Throws Error: INPUT where there is no kit, VERIFY for a damaged one.
Kit read_kit(const std::string& folder);

// Holds every file of every graph against its hash. Throws Error, VERIFY, naming the first bad one.
void check_graphs(const Kit& kit);

std::string graph_folder(const Kit& kit, const std::string& name);

}  // namespace edgeqdm::bench
