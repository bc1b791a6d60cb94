// Files of a package, and results, written whole or not at all.
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

// Tells a file from what is written over it or put in its place. Not by its inode, which some
// network and user-space file systems number anew every time.
struct FileState {
  std::uint64_t size;
  std::int64_t seconds, nanoseconds;  // of its last change

  bool operator==(const FileState& other) const noexcept;
};

// Of the name itself, not of what a link points to; all zeros where there is nothing.
FileState file_state(const std::string& path) noexcept;

// Size and SHA-256 of a regular file, in the state it had before it was read. Throws Error, VERIFY.
struct Fingerprint {
  std::uint64_t size;
  std::string sha256;
  FileState state;
};
Fingerprint fingerprint(const std::string& path);
std::uint64_t file_size(const std::string& path);

// All bytes of a regular file of at most `max_bytes`. Throws Error of this status.
Bytes read_file(const std::string& path, std::uint64_t max_bytes, int status);

// The file that writing to `path` replaces or makes: links followed, without a link in its folder.
// Throws Error, OUTPUT, for what is no regular file and for a folder that cannot be written.
std::string writable_target(const std::string& path);

// Writes to a temporary sibling of the target, then renames it. Throws Error, OUTPUT.
void write_atomically(const std::string& path, const Bytes& data);

// The same text without control characters: names out of files can hold line breaks.
std::string printable(const std::string& text);

// Opens /dev/null in place of every standard stream that is closed: a file opened later would take
// its number, and get what is printed. To be called before anything is opened.
void reserve_standard_streams() noexcept;

}  // namespace edgeqdm
