#include "kit.h"

#include <unistd.h>

#include <algorithm>

#include "error.h"
#include "files.h"
#include "json.h"
#include "manifest.h"
#include "sha256.h"

namespace edgeqdm::bench {
namespace {

constexpr std::uint64_t schema_version = 1;
constexpr const char* model_name = "model.onnx";
// Far beyond any input of a network, and no product of it with 8 bytes overflows.
constexpr std::uint64_t max_input_values = std::uint64_t{1} << 31;
constexpr std::size_t max_rank = 32;

[[noreturn]] void damaged(const std::string& reason) { throw Error(EDGEQDM_VERIFY, reason); }

const Json& array(const Json& owner, const char* name) {
  const Json& found = owner.field(name);
  if (found.kind != Json::Kind::array) damaged(std::string(name) + " is not a list");
  return found;
}

const std::string& text(const Json& owner, const char* name) {
  return owner.field(name).string(name);
}

bool all_of(const std::string& value, const char* letters, std::size_t length) {
  return value.size() == length && value.find_first_not_of(letters) == std::string::npos;
}

Input read_input(const Json& entry) {
  Input input;
  input.name = text(entry, "name");
  const std::string& dtype = text(entry, "dtype");
  if (dtype != "float32" && dtype != "int64") damaged("an input of " + dtype.substr(0, 40));
  input.integer = dtype == "int64";
  std::uint64_t size = 1;
  const Json& shape = array(entry, "shape");
  if (shape.items.size() > max_rank) damaged("an input of too many dimensions");
  for (const Json& item : shape.items) {
    const std::uint64_t length = item.natural("shape");
    if (length == 0 || length > max_input_values / size) damaged("an input of a wrong shape");
    size *= length;
    input.shape.push_back(static_cast<std::int64_t>(length));
  }
  input.size = static_cast<std::size_t>(size);
  return input;
}

std::map<std::string, std::string> read_files(const Json& entry) {
  const Json& listed = entry.field("files");
  if (listed.kind != Json::Kind::object) damaged("files is not an object");
  std::map<std::string, std::string> files;
  for (const auto& [path, sha256] : listed.fields) {
    const std::string fault = path_fault(path);
    if (!fault.empty()) damaged("file " + path.substr(0, 200) + ": " + fault);
    if (!all_of(sha256.string("sha256"), "0123456789abcdef", 64)) damaged("a wrong SHA-256");
    files[path] = sha256.text;
  }
  if (files.count(model_name) == 0) damaged(std::string("a graph without ") + model_name);
  return files;
}

Layers read_layers(const Json& entry) {
  Layers layers;
  const auto found = entry.fields.find("precisions");
  if (found == entry.fields.end()) return layers;
  if (found->second.kind != Json::Kind::object) damaged("precisions is not an object");
  for (const auto& [layer, precision] : found->second.fields) {
    if (precision.string("precision") != "fp32") layers.emplace(layer, precision.text);
  }
  return layers;
}

Graph read_graph(const Json& entry) {
  Graph graph;
  graph.name = text(entry, "name");
  if (!all_of(graph.name, "0123456789", 4)) {
    damaged("graph name " + graph.name.substr(0, 40) + " is not four digits");
  }
  graph.role = text(entry, "role");
  const std::string roles[] = {"reference", "overhead", "entry", "boundary", "whole", "phase"};
  if (std::find(std::begin(roles), std::end(roles), graph.role) == std::end(roles)) {
    damaged("role " + graph.role.substr(0, 40));
  }
  graph.files = read_files(entry);
  for (const Json& input : array(entry, "inputs").items) graph.inputs.push_back(read_input(input));
  graph.layers = read_layers(entry);
  const auto other = entry.fields.find("other");
  graph.among = other != entry.fields.end() && other->second.kind != Json::Kind::null;
  return graph;
}

// What the order of the measurement and the profile made of it need.
void check_complete(const std::vector<Graph>& graphs) {
  std::set<std::string> names, roles;
  std::set<Layers> alone;
  for (const Graph& graph : graphs) {
    if (!names.insert(graph.name).second) damaged("graph " + graph.name + " is there twice");
    roles.insert(graph.role);
    if (graph.role == "phase" && !graph.among) alone.insert(graph.layers);
  }
  for (const char* role : {"reference", "overhead"}) {
    if (roles.count(role) == 0) damaged(std::string("there is no ") + role + " graph");
  }
  for (const Graph& graph : graphs) {
    if (graph.role == "phase" && alone.count(graph.layers) == 0) {
      damaged("there is no graph of " + graph.name + " alone");
    }
  }
}

Kit parse_kit(const Bytes& data) {
  const Json document = parse_json(data.data(), data.size());
  if (document.field("schema_version").natural("schema_version") != schema_version) {
    damaged("schema_version is not " + std::to_string(schema_version) +
            ", make the kit with the edgeqdm this program is of");
  }
  Kit kit;
  for (const Json& entry : array(document, "graphs").items) {
    kit.graphs.push_back(read_graph(entry));
  }
  check_complete(kit.graphs);
  const auto reference = std::find_if(kit.graphs.begin(), kit.graphs.end(),
                                      [](const Graph& g) { return g.role == "reference"; });
  kit.reference = reference->name;
  Sha256 sha256;
  sha256.update(data.data(), data.size());
  kit.sha256 = sha256.hex();
  return kit;
}

}  // namespace

const Graph& Kit::graph(const std::string& name) const {
  return *std::find_if(graphs.begin(), graphs.end(),
                       [&name](const Graph& graph) { return graph.name == name; });
}

Kit read_kit(const std::string& folder) {
  const std::string path = folder + "/kit.json";
  if (::access(path.c_str(), F_OK) != 0) {
    throw Error(EDGEQDM_INPUT,
                folder + " holds no kit.json; make a kit with `edgeqdm profile kit`");
  }
  const Bytes data = read_file(path, max_json_bytes, EDGEQDM_VERIFY);
  try {
    Kit kit = parse_kit(data);
    kit.folder = folder;
    return kit;
  } catch (const Error& error) {
    damaged(path + ": " + error.what() + "; copy the kit again");
  }
}

void check_graphs(const Kit& kit) {
  for (const Graph& graph : kit.graphs) {
    const std::string folder = graph_folder(kit, graph.name);
    for (const auto& [path, sha256] : graph.files) {
      const std::string fault = file_fault(folder, path);
      if (fault == "missing") damaged(folder + "/" + path + ": missing; copy the kit again");
      // A copy made of hard links is as good as any other.
      if (!fault.empty() && fault != "hard link") {
        damaged(folder + "/" + path + ": not a regular file of its own; copy the kit again");
      }
      if (fingerprint(folder + "/" + path).sha256 != sha256) {
        damaged(folder + "/" + path + ": damaged; copy the kit again");
      }
    }
  }
}

std::string graph_folder(const Kit& kit, const std::string& name) {
  return kit.folder + "/graphs/" + name;
}

}  // namespace edgeqdm::bench
