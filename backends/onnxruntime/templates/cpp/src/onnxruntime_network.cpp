// The network on ONNX Runtime, through its C API only.
#include <onnxruntime_c_api.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "error.h"
#include "files.h"
#include "network.h"
#include "onnxruntime_library.h"

namespace edgeqdm {
namespace {

template <typename T>
Handle<T> handle(T* object, void(ORT_API_CALL* release)(T*)) {
  return Handle<T>(object, Release<T>{release});
}

// One line of what the library says.
std::string first_line(const char* text) {
  const std::string all = text;
  return printable(all.substr(0, std::min(all.find('\n'), std::size_t{300})));
}

// Loading a graph frees more than it keeps: its file and every copy of the weights but the packed
// one. glibc holds on to such memory, several times what is in use; others do not.
void give_back_freed() noexcept {
#ifdef __GLIBC__
  malloc_trim(0);
#endif
}

// What loading takes at least beside a few copies of the weights.
constexpr std::uint64_t least_to_load = std::uint64_t{16} << 20;

// Where an allocation fails while it loads a graph, ONNX Runtime (1.31.1) may end with a signal.
// Under a limit that is found here; where memory is promised and not there, no one can find it.
void require_memory(std::uint64_t model_bytes) {
  const std::uint64_t needed = 3 * model_bytes + least_to_load;
  void* place = MAP_FAILED;
  if (needed <= SIZE_MAX) {
    place = ::mmap(nullptr, static_cast<std::size_t>(needed), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  }
  if (place == MAP_FAILED) {
    throw Error(EDGEQDM_RESOURCE, "out of memory - to load the model takes about " +
                                      std::to_string(needed >> 20) + " MiB, end other programs");
  }
  ::munmap(place, static_cast<std::size_t>(needed));
}

// The graph that serves the steps from `start` on.
struct Phase {
  std::uint32_t start;
  Handle<OrtSession> session;
};

class OnnxRuntimeNetwork final : public Network {
 public:
  OnnxRuntimeNetwork(const ModelSource& source, const Table& table, const NetworkOptions& options)
      : Network(table),
        library_(open_onnxruntime(options.library)),
        api_(*library_.api) {
    OrtEnv* env = nullptr;
    // What the library would log of an error is in the status, too.
    check(api_.CreateEnv(ORT_LOGGING_LEVEL_FATAL, "edgeqdm", &env), EDGEQDM_INTERNAL, "");
    env_ = handle(env, api_.ReleaseEnv);
    OrtMemoryInfo* memory = nullptr;
    check(api_.CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &memory),
          EDGEQDM_INTERNAL, "");
    memory_ = handle(memory, api_.ReleaseMemoryInfo);
    open(source, options);
    check_graph(table);
    give_back_freed();
  }

  void run(std::uint32_t step) override {
    step_ = step;
    // Not an IoBinding: for a provider with memory of its own that copies an input when it is
    // bound, not when it is run, and would go on feeding the first sample. On the CPU neither
    // copies, and both write into the output given here.
    OrtValue* output = output_value_.get();
    check(api_.Run(session_at(step), nullptr, input_names_.data(), inputs_.data(), inputs_.size(),
                   &output_name_, 1, &output),
          EDGEQDM_INTERNAL, "the network fails: ");
  }

 protected:
  void bind() override {
    constexpr auto floats = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    constexpr auto integers = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    values_.clear();
    values_.push_back(tensor(sample_.data(), sample_.size() * 4, sample_shape_, floats));
    values_.push_back(tensor(&step_, sizeof step_, {}, integers));
    if (conditioning_shape_.size() == 1) {
      values_.push_back(tensor(labels_.data(), labels_.size() * 8, conditioning_shape_, integers));
    } else if (!conditioning_shape_.empty()) {
      values_.push_back(
          tensor(embeddings_.data(), embeddings_.size() * 4, conditioning_shape_, floats));
    }
    inputs_.clear();
    for (const Handle<OrtValue>& value : values_) inputs_.push_back(value.get());
    output_value_ = tensor(output_.data(), output_.size() * 4, output_shape_, floats);
  }

 private:
  // `what` is no std::string: that would be an allocation in every step.
  void check(OrtStatus* status, edgeqdm_status meaning, const char* what) const {
    if (status == nullptr) return;
    // Where memory ran out is said at the end, behind names of nodes.
    const bool no_memory = means_no_memory(api_.GetErrorMessage(status));
    const std::string message = first_line(api_.GetErrorMessage(status));
    api_.ReleaseStatus(status);
    if (no_memory) {
      throw Error(EDGEQDM_RESOURCE, "out of memory - draw fewer images at once: " + message);
    }
    throw Error(meaning, what + message);
  }

  Handle<OrtValue> tensor(void* data, std::size_t n_bytes, const std::vector<std::int64_t>& shape,
                          ONNXTensorElementDataType type) const {
    OrtValue* value = nullptr;
    check(api_.CreateTensorWithDataAsOrtValue(memory_.get(), data, n_bytes, shape.data(),
                                              shape.size(), type, &value),
          EDGEQDM_INTERNAL, "");
    return handle(value, api_.ReleaseValue);
  }

  OrtSession* session_at(std::uint32_t step) const noexcept {
    auto after = std::upper_bound(
        sessions_.begin(), sessions_.end(), step,
        [](std::uint32_t wanted, const Phase& phase) { return wanted < phase.start; });
    return std::prev(after)->session.get();
  }

  void open(const ModelSource& source, const NetworkOptions& asked) {
    OrtSessionOptions* created = nullptr;
    check(api_.CreateSessionOptions(&created), EDGEQDM_INTERNAL, "");
    const auto options = handle(created, api_.ReleaseSessionOptions);
    check(api_.SetIntraOpNumThreads(options.get(), asked.threads), EDGEQDM_INPUT, "");
    check(api_.SetInterOpNumThreads(options.get(), 1), EDGEQDM_INTERNAL, "");
    check(api_.SetSessionLogSeverityLevel(options.get(), ORT_LOGGING_LEVEL_FATAL),
          EDGEQDM_INTERNAL, "");
    if (!asked.provider.empty()) append_provider(options.get(), asked.provider);
    OrtSession* session = nullptr;
    if (source.bytes != nullptr) {
      require_memory(source.n_bytes);
      check(api_.CreateSessionFromArray(env_.get(), source.bytes, source.n_bytes, options.get(),
                                        &session),
            EDGEQDM_VERIFY, refused("the model").c_str());
      sessions_.push_back({0, handle(session, api_.ReleaseSession)});
      return;
    }
    // The files are what the manifest says: with a provider, it is that which cannot do it.
    const auto meaning = asked.provider.empty() ? EDGEQDM_VERIFY : EDGEQDM_UNSUPPORTED;
    for (const auto& [start, path] : source.paths) {
      require_memory(file_size(path));
      check(api_.CreateSession(env_.get(), path.c_str(), options.get(), &session), meaning,
            refused(path.substr(path.rfind('/') + 1)).c_str());
      sessions_.push_back({start, handle(session, api_.ReleaseSession)});
    }
  }

  std::string refused(const std::string& what) const {
    return "onnxruntime " + library_.version + " refuses " + what + ": ";
  }

  void append_provider(OrtSessionOptions* options, const std::string& name) const {
    OrtStatus* status = api_.SessionOptionsAppendExecutionProvider(options, name.c_str(), nullptr,
                                                                   nullptr, 0);
    if (status == nullptr) return;
    const std::string reason = first_line(api_.GetErrorMessage(status));
    api_.ReleaseStatus(status);
    throw Error(EDGEQDM_UNSUPPORTED, "no execution provider " + printable(name) +
                                         " here; this library has " + available() + ": " + reason);
  }

  std::string available() const {
    char** names = nullptr;
    int n = 0;
    check(api_.GetAvailableProviders(&names, &n), EDGEQDM_INTERNAL, "");
    std::string list;
    for (int k = 0; k < n; ++k) list += std::string(k == 0 ? "" : ", ") + names[k];
    OrtStatus* status = api_.ReleaseAvailableProviders(names, n);
    if (status != nullptr) api_.ReleaseStatus(status);
    return list;
  }

  using GetName = OrtStatus*(ORT_API_CALL*)(const OrtSession*, std::size_t, OrtAllocator*, char**);
  using GetType = OrtStatus*(ORT_API_CALL*)(const OrtSession*, std::size_t, OrtTypeInfo**);

  std::string name_of(const OrtSession* session, GetName get, std::size_t index) const {
    OrtAllocator* allocator = nullptr;
    check(api_.GetAllocatorWithDefaultOptions(&allocator), EDGEQDM_INTERNAL, "");
    char* name = nullptr;
    check(get(session, index, allocator, &name), EDGEQDM_INTERNAL, "");
    const std::string found = name;
    check(api_.AllocatorFree(allocator, name), EDGEQDM_INTERNAL, "");
    return found;
  }

  // Whether the graph's input or output is a tensor of this type and, but for the first dimension
  // and those the graph leaves open, of this shape.
  bool fits(const OrtSession* session, GetType get, std::size_t index,
            ONNXTensorElementDataType type, const std::vector<std::int64_t>& shape) const {
    OrtTypeInfo* info = nullptr;
    check(get(session, index, &info), EDGEQDM_INTERNAL, "");
    const auto owned = handle(info, api_.ReleaseTypeInfo);
    const OrtTensorTypeAndShapeInfo* found = nullptr;
    check(api_.CastTypeInfoToTensorInfo(info, &found), EDGEQDM_INTERNAL, "");
    if (found == nullptr) return false;
    ONNXTensorElementDataType element = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    std::size_t rank = 0;
    check(api_.GetTensorElementType(found, &element), EDGEQDM_INTERNAL, "");
    check(api_.GetDimensionsCount(found, &rank), EDGEQDM_INTERNAL, "");
    if (element != type || rank != shape.size()) return false;
    std::vector<std::int64_t> sizes(rank);
    check(api_.GetDimensions(found, sizes.data(), rank), EDGEQDM_INTERNAL, "");
    for (std::size_t k = 1; k < rank; ++k) {
      if (sizes[k] >= 0 && sizes[k] != shape[k]) return false;
    }
    return true;
  }

  void check_graph(const Table& table) {
    input_names_ = {"sample", "step"};
    if (table.conditioning == layout::conditioning_label) input_names_.push_back("label");
    if (table.conditioning == layout::conditioning_embedding) input_names_.push_back("embedding");
    for (const Phase& phase : sessions_) check_session(phase.session.get());
    output_name_ = output_name_text_.c_str();
  }

  void check_session(const OrtSession* session) {
    std::size_t n_inputs = 0, n_outputs = 0;
    check(api_.SessionGetInputCount(session, &n_inputs), EDGEQDM_INTERNAL, "");
    check(api_.SessionGetOutputCount(session, &n_outputs), EDGEQDM_INTERNAL, "");
    bool good = n_inputs == input_names_.size() && n_outputs >= 1;
    for (std::size_t k = 0; good && k < n_inputs; ++k) {
      good = fits_input(session, name_of(session, api_.SessionGetInputName, k), k);
    }
    good = good && fits(session, api_.SessionGetOutputTypeInfo, 0,
                        ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, output_shape_);
    const std::string output = good ? name_of(session, api_.SessionGetOutputName, 0) : "";
    if (output_name_text_.empty()) output_name_text_ = output;
    if (!good || output != output_name_text_) {
      throw Error(EDGEQDM_VERIFY, "the model does not fit schedule.bin");
    }
  }

  bool fits_input(const OrtSession* session, const std::string& name, std::size_t index) const {
    constexpr auto floats = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    constexpr auto integers = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    const auto of = [&](ONNXTensorElementDataType type, const std::vector<std::int64_t>& shape) {
      return fits(session, api_.SessionGetInputTypeInfo, index, type, shape);
    };
    if (name == "sample") return of(floats, sample_shape_);
    if (name == "step") return of(integers, {});
    const std::size_t rank = conditioning_shape_.size();
    if (name == "label") return rank == 1 && of(integers, conditioning_shape_);
    return name == "embedding" && rank > 1 && of(floats, conditioning_shape_);
  }

  OnnxRuntime library_;
  const OrtApi& api_;
  Handle<OrtEnv> env_;
  Handle<OrtMemoryInfo> memory_;
  std::vector<Phase> sessions_;  // in order
  std::vector<const char*> input_names_;
  std::string output_name_text_;
  const char* output_name_ = nullptr;
  std::int64_t step_ = 0;
  std::vector<Handle<OrtValue>> values_;
  std::vector<const OrtValue*> inputs_;
  Handle<OrtValue> output_value_;
};

}  // namespace

std::unique_ptr<Network> open_network(const ModelSource& source, const Table& table,
                                      const NetworkOptions& options) {
  return std::make_unique<OnnxRuntimeNetwork>(source, table, options);
}

}  // namespace edgeqdm
