// The command line.
#pragma once

#include <string>

#include "device.h"

namespace edgeqdm::bench {

struct Options {
  std::string folder;  // of a kit or a package
  bool package = false;
  unsigned threads = 1;
  Cpus cpus;  // empty: the fastest ones
  std::string name;
  std::string power_mode = "unknown";
  double seconds = 1.0;
  double max_seconds = 6.0;
  bool emulator = false;
  std::string out;
  std::string library;  // empty: where it is usually found
  bool help = false;
  bool version = false;
};

extern const char* const help_text;

// Throws Error: with the exit code of wrong usage, or INPUT for too many threads.
Options parse_options(int n, char** values);

}  // namespace edgeqdm::bench
