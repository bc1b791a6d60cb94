// Draws images of a package for at least as many steps as asked, and prints the steps and what was
// allocated in them outside of ONNX Runtime.
//
//   count_allocations PACKAGE STEPS
#include <cstdio>
#include <cstdlib>

#include "edgeqdm.h"
#include "hooks.h"

int main(int n, char** values) {
  if (n != 3) return 2;
  edgeqdm_session* session = nullptr;
  if (edgeqdm_open(values[1], nullptr, &session) != EDGEQDM_OK) return 1;
  // Proof that the count works: the message of a failure is allocated.
  count_allocations(true);
  const char* name = nullptr;
  size_t length = 0;
  if (edgeqdm_label_name(session, 1000, &name, &length) != EDGEQDM_INPUT) return 1;
  count_allocations(false);
  const unsigned long before = allocations();
  int steps = 0;
  while (steps < std::atoi(values[2])) {
    const int64_t labels[2] = {0, 1};
    if (edgeqdm_begin(session, 7, 0, 2, labels, nullptr) != EDGEQDM_OK) return 1;
    for (uint32_t left = 1; left > 0; ++steps) {
      count_allocations(true);
      const edgeqdm_status status = edgeqdm_step(session, &left);
      count_allocations(false);
      if (status != EDGEQDM_OK) return 1;
    }
  }
  std::printf("%lu %d %lu\n", before, steps, allocations() - before);
  edgeqdm_close(session);
  return 0;
}
