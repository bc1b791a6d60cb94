// ONNX Runtime's library, found when a session is opened and not when the program starts: one that
// is missing or too old is then an error of ours, with a status and a message, and a program runs
// with newer libraries than the one it was built beside (their symbols carry their version).
#pragma once

#include <onnxruntime_c_api.h>

#include <string>

namespace edgeqdm {

struct OnnxRuntime {
  const OrtApi* api = nullptr;
  std::string version;
};

// `path` names the library; where it is empty, EDGEQDM_ONNXRUNTIME of the environment does, then the
// place it had when this was built, then its plain name. It is never unloaded. Throws Error,
// UNSUPPORTED.
OnnxRuntime open_onnxruntime(const std::string& path);

}  // namespace edgeqdm
