// The one exception of the library; it becomes a status and a message at the C ABI.
#pragma once

#include <stdexcept>
#include <string>

#include "edgeqdm.h"

namespace edgeqdm {

class Error : public std::runtime_error {
 public:
  Error(edgeqdm_status status, const std::string& message)
      : std::runtime_error(message), status_(status) {}

  edgeqdm_status status() const noexcept { return status_; }

 private:
  edgeqdm_status status_;
};

}  // namespace edgeqdm
