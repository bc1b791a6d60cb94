// manifest.json: whether it is sealed and every file it lists is there and unchanged.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "files.h"

namespace edgeqdm {

struct Artifact {
  std::string sha256;
  std::uint64_t size;
  FileState state;  // when it was checked
};

struct Manifest {
  std::map<std::string, Artifact> files;
  bool sealed;
};

// Throws Error, VERIFY, for anything but a manifest of the version this runtime reads.
Manifest parse_manifest(const Bytes& data);

// The package's graphs by the first step that each serves; none where the first is missing.
std::map<std::uint32_t, std::string> find_graphs(const Manifest& manifest);

// What is wrong with a path as the name of a file of a package; "" if nothing is.
std::string path_fault(const std::string& path);

// Checks a whole package; throws Error, VERIFY, naming every file that is not as listed. Files
// that are not listed are left alone, as by run.py: this library opens none of them.
Manifest check_package(const std::string& folder);

// Throws Error, VERIFY, unless every file is the one that was checked: what is read in between was
// not replaced by an update that ran at the same time.
void require_unchanged(const std::string& folder, const Manifest& manifest);

}  // namespace edgeqdm
