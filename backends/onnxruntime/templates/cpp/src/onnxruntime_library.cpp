#include "onnxruntime_library.h"

#include <array>
#include <cstdlib>
#include <vector>

#ifndef EDGEQDM_LINK_ONNXRUNTIME
#include <dlfcn.h>
#endif

#include "error.h"
#include "files.h"

namespace edgeqdm {
namespace {

// Older libraries do not run all of these graphs: 1.22 lacks a cast of 4-bit integers.
constexpr const char* oldest_library = "1.23.0";

#ifdef EDGEQDM_LINK_ONNXRUNTIME

const OrtApiBase* find_base(const std::string&) { return OrtGetApiBase(); }

#else

#ifdef __APPLE__
constexpr std::array<const char*, 1> plain_names = {"libonnxruntime.dylib"};
#else
constexpr std::array<const char*, 2> plain_names = {"libonnxruntime.so", "libonnxruntime.so.1"};
#endif

std::vector<std::string> candidates(const std::string& path) {
  if (!path.empty()) return {path};
  const char* asked = std::getenv("EDGEQDM_ONNXRUNTIME");
  if (asked != nullptr && asked[0] != '\0') return {asked};
  std::vector<std::string> found;
#ifdef EDGEQDM_ONNXRUNTIME_BUILT
  found.emplace_back(EDGEQDM_ONNXRUNTIME_BUILT);
#endif
  found.insert(found.end(), plain_names.begin(), plain_names.end());
  return found;
}

const OrtApiBase* find_base(const std::string& path) {
  std::string reasons;
  for (const std::string& name : candidates(path)) {
    void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    void* symbol = library == nullptr ? nullptr : dlsym(library, "OrtGetApiBase");
    if (symbol != nullptr) {
      const auto get = reinterpret_cast<const OrtApiBase*(ORT_API_CALL*)()>(symbol);
      return get();
    }
    const char* reason = dlerror();
    reasons += (reasons.empty() ? "" : "; ") + printable(reason == nullptr ? name : reason);
  }
  throw Error(EDGEQDM_UNSUPPORTED,
              "no library of ONNX Runtime (" + reasons +
                  ") - install it, or name its file with --library or in EDGEQDM_ONNXRUNTIME");
}

#endif

std::array<unsigned, 3> parse_version(const char* text) {
  std::array<unsigned, 3> parts{};
  for (unsigned& part : parts) {
    while (*text >= '0' && *text <= '9') part = 10 * part + static_cast<unsigned>(*text++ - '0');
    if (*text++ != '.') break;
  }
  return parts;
}

}  // namespace

OnnxRuntime open_onnxruntime(const std::string& path) {
  const OrtApiBase* base = find_base(path);
  OnnxRuntime found;
  found.version = base->GetVersionString();
  if (parse_version(found.version.c_str()) < parse_version(oldest_library)) {
    throw Error(EDGEQDM_UNSUPPORTED, "ONNX Runtime " + found.version +
                                         " is too old, this package needs " + oldest_library +
                                         " or newer");
  }
  found.api = base->GetApi(ORT_API_VERSION);
  if (found.api == nullptr) {
    throw Error(EDGEQDM_UNSUPPORTED,
                "ONNX Runtime " + found.version + " does not have the interface 1." +
                    std::to_string(ORT_API_VERSION) + " that this program was built with");
  }
  return found;
}

bool means_no_memory(const std::string& message) {
  for (const char* sign : {"bad_alloc", "bad allocation", "Failed to allocate memory"}) {
    if (message.find(sign) != std::string::npos) return true;
  }
  return false;
}

}  // namespace edgeqdm
