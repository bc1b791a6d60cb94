// Files of a package, read without following links, and results, written whole or not at all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace edgeqdm {

using Bytes = std::vector<unsigned char>;

// What is wrong with a file, in the words of the message; "" if nothing is.
// `missing`, `not a path inside the package`, `hard link` or `not a regular file`.
std::string file_fault(const std::string& folder, const std::string& relative);

// Size and SHA-256 of a regular file. Throws Error, VERIFY.
struct Fingerprint {
  std::uint64_t size;
  std::string sha256;
};
Fingerprint fingerprint(const std::string& path);
std::uint64_t file_size(const std::string& path);

// All bytes of a regular file of at most `max_bytes`. Throws Error of this status.
Bytes read_file(const std::string& path, std::uint64_t max_bytes, int status);

// Writes to a temporary sibling, then renames it. Throws Error, OUTPUT.
void write_atomically(const std::string& path, const Bytes& data);

// The same text without control characters: names out of files can hold line breaks.
std::string printable(const std::string& text);

}  // namespace edgeqdm
