// Graphs of a kit on ONNX Runtime, through its C API only.
#pragma once

#include <memory>
#include <string>

#include "bench.h"
#include "kit.h"

namespace edgeqdm::bench {

// Version of the library. Throws Error, UNSUPPORTED, where there is none that can be used.
std::string library_version();

// A graph with inputs made up. Throws Error: UNSUPPORTED where the library refuses the graph,
// VERIFY where kit.json does not fit it, RESOURCE.
std::unique_ptr<Evaluation> open_graph(const std::string& folder, const Graph& graph,
                                       unsigned threads);

}  // namespace edgeqdm::bench
