// ONNX Runtime's library, found when a session is opened and not when the program starts: one that
// is missing or too old is then an error of ours, with a status and a message, and a program runs
// with newer libraries than the one it was built beside (their symbols carry their version).
#pragma once

#include <onnxruntime_c_api.h>

#include <memory>
#include <string>

namespace edgeqdm {

// An object of the library and how it is released.
template <typename T>
struct Release {
  void(ORT_API_CALL* release)(T*) = nullptr;
  void operator()(T* object) const noexcept { release(object); }
};
template <typename T>
using Handle = std::unique_ptr<T, Release<T>>;

struct OnnxRuntime {
  const OrtApi* api = nullptr;
  std::string version;
};

// `path` names the library; where it is empty, EDGEQDM_ONNXRUNTIME of the environment does, then the
// place it had when this was built, then its plain name. It is never unloaded. Throws Error,
// UNSUPPORTED.
OnnxRuntime open_onnxruntime(const std::string& path);

// Whether a message of the library says that memory was lacking.
bool means_no_memory(const std::string& message);

}  // namespace edgeqdm
