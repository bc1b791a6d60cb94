#include "files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "error.h"
#include "sha256.h"

namespace edgeqdm {
namespace {

// An open file that closes itself.
class File {
 public:
  explicit File(int descriptor) noexcept : descriptor_(descriptor) {}
  ~File() { close(); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  int get() const noexcept { return descriptor_; }
  bool is_open() const noexcept { return descriptor_ >= 0; }
  int close() noexcept {
    const int result = descriptor_ < 0 ? 0 : ::close(descriptor_);
    descriptor_ = -1;
    return result;
  }

 private:
  int descriptor_;
};

std::string reason() { return std::strerror(errno); }

// Without O_NONBLOCK opening a FIFO waits for a writer that may never come.
int open_regular(const std::string& path, struct stat* found, int status) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
  if (descriptor < 0) {
    throw Error(static_cast<edgeqdm_status>(status), printable(path) + ": " + reason());
  }
  if (::fstat(descriptor, found) == 0 && S_ISREG(found->st_mode)) return descriptor;
  ::close(descriptor);
  throw Error(static_cast<edgeqdm_status>(status), printable(path) + ": not a regular file");
}

FileState state_of(const struct stat& found) noexcept {
#ifdef __APPLE__
  const struct timespec& changed = found.st_ctimespec;
#else
  const struct timespec& changed = found.st_ctim;
#endif
  return {static_cast<std::uint64_t>(found.st_dev), static_cast<std::uint64_t>(found.st_ino),
          static_cast<std::uint64_t>(found.st_size), static_cast<std::int64_t>(changed.tv_sec),
          static_cast<std::int64_t>(changed.tv_nsec)};
}

// Number of bytes read, less than asked for only at the end.
std::size_t read_some(int descriptor, unsigned char* bytes, std::size_t n, const std::string& path,
                      int status) {
  std::size_t done = 0;
  while (done < n) {
    const ssize_t more = ::read(descriptor, bytes + done, n - done);
    if (more < 0 && errno == EINTR) continue;
    if (more < 0) {
      throw Error(static_cast<edgeqdm_status>(status), printable(path) + ": " + reason());
    }
    if (more == 0) break;
    done += static_cast<std::size_t>(more);
  }
  return done;
}

bool write_all(int descriptor, const Bytes& data) {
  std::size_t done = 0;
  while (done < data.size()) {
    const ssize_t more = ::write(descriptor, data.data() + done, data.size() - done);
    if (more < 0 && errno == EINTR) continue;
    if (more < 0) return false;
    done += static_cast<std::size_t>(more);
  }
  return true;
}

}  // namespace

std::string file_fault(const std::string& folder, const std::string& relative) {
  const char* outside = "not a path inside the package";
  struct stat found;
  // Every folder on the way, too: a link there leads as far away as one at the end.
  for (std::size_t slash = relative.find('/'); slash != std::string::npos;
       slash = relative.find('/', slash + 1)) {
    if (::lstat((folder + "/" + relative.substr(0, slash)).c_str(), &found) != 0) return "missing";
    if (!S_ISDIR(found.st_mode)) return outside;
  }
  if (::lstat((folder + "/" + relative).c_str(), &found) != 0) return "missing";
  if (S_ISLNK(found.st_mode)) return outside;
  if (S_ISDIR(found.st_mode)) return "missing";
  if (!S_ISREG(found.st_mode)) return "not a regular file";
  return found.st_nlink > 1 ? "hard link" : "";
}

bool FileState::operator==(const FileState& other) const noexcept {
  return device == other.device && inode == other.inode && size == other.size &&
         seconds == other.seconds && nanoseconds == other.nanoseconds;
}

FileState file_state(const std::string& path) noexcept {
  struct stat found;
  return ::lstat(path.c_str(), &found) == 0 ? state_of(found) : FileState{};
}

std::uint64_t file_size(const std::string& path) {
  struct stat found;
  if (::lstat(path.c_str(), &found) != 0) throw Error(EDGEQDM_VERIFY, path + ": " + reason());
  return static_cast<std::uint64_t>(found.st_size);
}

Fingerprint fingerprint(const std::string& path) {
  struct stat found;
  const File file(open_regular(path, &found, EDGEQDM_VERIFY));
  Sha256 sha256;
  Bytes block(std::size_t{1} << 16);
  std::uint64_t size = 0;
  while (const std::size_t n =
             read_some(file.get(), block.data(), block.size(), path, EDGEQDM_VERIFY)) {
    sha256.update(block.data(), n);
    size += n;
  }
  return {size, sha256.hex(), state_of(found)};
}

Bytes read_file(const std::string& path, std::uint64_t max_bytes, int status) {
  struct stat found;
  const File file(open_regular(path, &found, status));
  const auto size = static_cast<std::uint64_t>(found.st_size);
  if (size > max_bytes) {
    throw Error(static_cast<edgeqdm_status>(status),
                printable(path) + ": larger than " + std::to_string(max_bytes) + " bytes");
  }
  Bytes data(static_cast<std::size_t>(size));
  data.resize(read_some(file.get(), data.data(), data.size(), path, status));
  return data;
}

void write_atomically(const std::string& path, const Bytes& data) {
  const auto fail = [&path] {
    throw Error(EDGEQDM_OUTPUT, "cannot write " + printable(path) + ": " + reason());
  };
  const std::size_t slash = path.rfind('/');
  const std::size_t name = slash == std::string::npos ? 0 : slash + 1;
  std::string partial = path.substr(0, name) + "." + path.substr(name) + ".XXXXXX";
  File file(::mkstemp(partial.data()));
  if (!file.is_open()) fail();
  // A rename is on the disk with the folder it is in; what it names must be there before.
  const bool written = write_all(file.get(), data) && ::fchmod(file.get(), 0644) == 0 &&
                       ::fsync(file.get()) == 0 && file.close() == 0 &&
                       ::rename(partial.c_str(), path.c_str()) == 0;
  if (!written) {
    const int kept = errno;
    ::unlink(partial.c_str());
    errno = kept;
    fail();
  }
}

std::string printable(const std::string& text) {
  std::string shown;
  for (char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte != 0x7F) {
      shown += c;
      continue;
    }
    const char* digits = "0123456789abcdef";
    shown += std::string("\\x") + digits[byte >> 4] + digits[byte & 15];
  }
  return shown;
}

}  // namespace edgeqdm
