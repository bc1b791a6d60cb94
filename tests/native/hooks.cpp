// Linked with -Wl,--wrap=OrtGetApiBase: an ONNX Runtime that is old, fails, gives NaN or is
// interrupted, as the environment asks, and a count of allocations outside its Run. With
// -Wl,--wrap=fsync: signals while a result is being written.
#include <onnxruntime_c_api.h>

#include <atomic>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>

#include "hooks.h"

extern "C" const OrtApiBase* __real_OrtGetApiBase();
extern "C" void* __real_malloc(std::size_t size);

namespace {

std::atomic<bool> counting{false};
std::atomic<bool> in_run{false};
std::atomic<unsigned long> n_allocations{0};
int n_runs = 0;

bool asked(const char* name, const char* value) {
  const char* found = std::getenv(name);
  return found != nullptr && std::strcmp(found, value) == 0;
}

const OrtApi* real_api() { return __real_OrtGetApiBase()->GetApi(ORT_API_VERSION); }

OrtStatus* ORT_API_CALL hooked_run(OrtSession* session, const OrtRunOptions* options,
                                   const char* const* input_names, const OrtValue* const* inputs,
                                   size_t n_inputs, const char* const* output_names,
                                   size_t n_outputs, OrtValue** outputs) noexcept {
  in_run = true;
  OrtStatus* status = real_api()->Run(session, options, input_names, inputs, n_inputs,
                                      output_names, n_outputs, outputs);
  ++n_runs;
  if (status == nullptr && n_runs == 2) {
    if (asked("EDGEQDM_TEST_RUN", "nan")) {
      void* data = nullptr;
      status = real_api()->GetTensorMutableData(outputs[0], &data);
      static_cast<float*>(data)[1] = NAN;
    }
    if (asked("EDGEQDM_TEST_RUN", "fail")) {
      status = real_api()->CreateStatus(ORT_FAIL, "first\nsecond");
    }
    if (asked("EDGEQDM_TEST_RUN", "memory")) {
      status = real_api()->CreateStatus(ORT_FAIL, "std::bad_alloc");
    }
    if (asked("EDGEQDM_TEST_RUN", "interrupt")) std::raise(SIGINT);
    if (asked("EDGEQDM_TEST_RUN", "terminate")) std::raise(SIGTERM);
  }
  in_run = false;
  return status;
}

const OrtApi* ORT_API_CALL hooked_api(uint32_t version) noexcept {
  if (std::getenv("EDGEQDM_TEST_NO_API") != nullptr) return nullptr;
  static OrtApi api;
  api = *__real_OrtGetApiBase()->GetApi(version);
  api.Run = hooked_run;
  return &api;
}

const char* ORT_API_CALL hooked_version() noexcept {
  const char* version = std::getenv("EDGEQDM_TEST_VERSION");
  return version != nullptr ? version : __real_OrtGetApiBase()->GetVersionString();
}

void* counted(std::size_t size) {
  if (counting && !in_run) ++n_allocations;
  return __real_malloc(size == 0 ? 1 : size);
}

}  // namespace

extern "C" const OrtApiBase* __wrap_OrtGetApiBase() {
  static const OrtApiBase base = {hooked_api, hooked_version};
  return &base;
}

void count_allocations(bool on) { counting = on; }

unsigned long allocations() { return n_allocations; }

void* operator new(std::size_t size) {
  if (void* memory = counted(size)) return memory;
  throw std::bad_alloc();
}

void operator delete(void* memory) noexcept { std::free(memory); }

void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

extern "C" {

void* __real_calloc(std::size_t n, std::size_t size);
void* __real_realloc(void* memory, std::size_t size);
int __real_fsync(int descriptor);

// What the objects of this program call themselves; a library's calls go past these.
void* __wrap_malloc(std::size_t size) {
  if (counting && !in_run) ++n_allocations;
  return __real_malloc(size);
}

void* __wrap_calloc(std::size_t n, std::size_t size) {
  if (counting && !in_run) ++n_allocations;
  return __real_calloc(n, size);
}

void* __wrap_realloc(void* memory, std::size_t size) {
  if (counting && !in_run) ++n_allocations;
  return __real_realloc(memory, size);
}

int __wrap_fsync(int descriptor) {
  if (asked("EDGEQDM_TEST_WRITE", "terminate")) {
    for (int signal : {SIGTERM, SIGTERM}) std::raise(signal);
  }
  return __real_fsync(descriptor);
}

}  // extern "C"
