#include "onnxruntime_graph.h"

#include <algorithm>
#include <vector>

#include "error.h"
#include "onnxruntime_library.h"
#include "philox.h"

namespace edgeqdm::bench {
namespace {

// One for all graphs: making it anew starts threads of the library's log.
struct Library {
  const OrtApi& api = *open_onnxruntime("").api;
  Handle<OrtEnv> env;
  Handle<OrtMemoryInfo> memory;
};

class OnnxRuntimeGraph final : public Evaluation {
 public:
  OnnxRuntimeGraph(Library& library, const std::string& folder, const Graph& graph,
                   unsigned threads)
      : library_(library), api_(library.api), path_(folder + "/model.onnx") {
    prepare_library();
    open(threads);
    OrtIoBinding* binding = nullptr;
    check(api_.CreateIoBinding(session_.get(), &binding), EDGEQDM_INTERNAL);
    binding_ = {binding, {api_.ReleaseIoBinding}};
    bind_inputs(graph);
    bind_outputs();
  }

  void run() override {
    check(api_.RunWithBinding(session_.get(), nullptr, binding_.get()), EDGEQDM_UNSUPPORTED);
  }

 private:
  void check(OrtStatus* status, edgeqdm_status meaning) const {
    if (status == nullptr) return;
    const std::string all = api_.GetErrorMessage(status);
    api_.ReleaseStatus(status);
    const std::string said =
        "onnxruntime says: " + all.substr(0, std::min(all.find('\n'), std::size_t{300}));
    if (meaning == EDGEQDM_RESOURCE || means_no_memory(all)) {
      throw Error(EDGEQDM_RESOURCE, path_ + ": out of memory; end other programs: " + said);
    }
    throw Error(meaning, path_ + ": " + said);
  }

  void prepare_library() {
    if (library_.env != nullptr) return;
    OrtEnv* env = nullptr;
    // What the library would log of an error is in the status, too.
    check(api_.CreateEnv(ORT_LOGGING_LEVEL_FATAL, "edgeqdm-bench", &env), EDGEQDM_INTERNAL);
    library_.env = {env, {api_.ReleaseEnv}};
    OrtMemoryInfo* memory = nullptr;
    check(api_.CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &memory),
          EDGEQDM_INTERNAL);
    library_.memory = {memory, {api_.ReleaseMemoryInfo}};
  }

  void open(unsigned threads) {
    OrtSessionOptions* created = nullptr;
    check(api_.CreateSessionOptions(&created), EDGEQDM_INTERNAL);
    const Handle<OrtSessionOptions> options{created, {api_.ReleaseSessionOptions}};
    check(api_.SetIntraOpNumThreads(created, static_cast<int>(threads)), EDGEQDM_INPUT);
    check(api_.SetInterOpNumThreads(created, 1), EDGEQDM_INTERNAL);
    check(api_.SetSessionLogSeverityLevel(created, ORT_LOGGING_LEVEL_FATAL), EDGEQDM_INTERNAL);
    OrtSession* session = nullptr;
    check(api_.CreateSession(library_.env.get(), path_.c_str(), created, &session),
          EDGEQDM_UNSUPPORTED);
    session_ = {session, {api_.ReleaseSession}};
  }

  using Count = OrtStatus*(ORT_API_CALL*)(const OrtSession*, std::size_t*);
  using Name = OrtStatus*(ORT_API_CALL*)(const OrtSession*, std::size_t, OrtAllocator*, char**);

  std::vector<std::string> names(Count count, Name name) const {
    std::size_t n = 0;
    OrtAllocator* allocator = nullptr;
    check(count(session_.get(), &n), EDGEQDM_INTERNAL);
    check(api_.GetAllocatorWithDefaultOptions(&allocator), EDGEQDM_INTERNAL);
    std::vector<std::string> found;
    for (std::size_t k = 0; k < n; ++k) {
      char* text = nullptr;
      check(name(session_.get(), k, allocator, &text), EDGEQDM_INTERNAL);
      found.emplace_back(text);
      check(api_.AllocatorFree(allocator, text), EDGEQDM_INTERNAL);
    }
    return found;
  }

  // The graph may lack inputs of the kit: what it does not depend on is no input of it.
  void bind_inputs(const Graph& graph) {
    std::uint32_t stream = 0;
    for (const std::string& name : names(api_.SessionGetInputCount, api_.SessionGetInputName)) {
      const auto given = std::find_if(graph.inputs.begin(), graph.inputs.end(),
                                      [&name](const Input& input) { return input.name == name; });
      if (given == graph.inputs.end()) {
        throw Error(EDGEQDM_VERIFY, path_ + ": its input " + name.substr(0, 40) +
                                        " is not in kit.json; copy the kit again");
      }
      bind(*given, stream++);
    }
  }

  // In memory of the library, aligned as its own: a kernel's time may depend on that.
  void bind(const Input& input, std::uint32_t stream) {
    OrtAllocator* allocator = nullptr;
    check(api_.GetAllocatorWithDefaultOptions(&allocator), EDGEQDM_INTERNAL);
    OrtValue* value = nullptr;
    check(api_.CreateTensorAsOrtValue(allocator, input.shape.data(), input.shape.size(),
                                      input.integer ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64
                                                    : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
                                      &value),
          EDGEQDM_RESOURCE);
    values_.push_back({value, {api_.ReleaseValue}});
    void* data = nullptr;
    check(api_.GetTensorMutableData(value, &data), EDGEQDM_INTERNAL);
    if (input.integer) {
      std::fill_n(static_cast<std::int64_t*>(data), input.size, std::int64_t{0});
    } else {
      standard_normal(0, stream, 0, static_cast<float*>(data), input.size);
    }
    check(api_.BindInput(binding_.get(), input.name.c_str(), value), EDGEQDM_VERIFY);
  }

  void bind_outputs() {
    for (const std::string& name : names(api_.SessionGetOutputCount, api_.SessionGetOutputName)) {
      check(api_.BindOutputToDevice(binding_.get(), name.c_str(), library_.memory.get()),
            EDGEQDM_INTERNAL);
    }
  }

  Library& library_;
  const OrtApi& api_;
  const std::string path_;
  // Released in reverse: the binding before the values that it points to.
  Handle<OrtSession> session_;
  std::vector<Handle<OrtValue>> values_;
  Handle<OrtIoBinding> binding_;
};

}  // namespace

std::string library_version() { return open_onnxruntime("").version; }

std::unique_ptr<Evaluation> open_graph(const std::string& folder, const Graph& graph,
                                       unsigned threads) {
  static Library library;
  return std::make_unique<OnnxRuntimeGraph>(library, folder, graph, threads);
}

}  // namespace edgeqdm::bench
