#include "results.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string_view>
#include <thread>
#include <vector>

#include "error.h"
#include "files.h"
#include "json_text.h"

namespace edgeqdm::bench {
namespace {

// Longer than a run takes to end whose owner was killed.
constexpr std::chrono::seconds lock_time{5};
constexpr double longest_us = 1e9;
// Behind it stands when the results were begun, which a torn header tells differently.
constexpr std::string_view time_mark = "\"created\":\"";

[[noreturn]] void refuse(const std::string& message) { throw Error(EDGEQDM_INPUT, message); }

[[noreturn]] void cannot_write(const std::string& path) {
  throw Error(EDGEQDM_OUTPUT, path + ": cannot be written (" + std::strerror(errno) +
                                  "); free the space or name another file with --out");
}

[[noreturn]] void cannot_read(const std::string& path) {
  refuse(path + ": cannot be read (" + std::strerror(errno) + ")");
}

int open_regular(const std::string& path, int more_flags) {
  // Without O_NONBLOCK opening a FIFO waits for a reader that may never come.
  const int flags = O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC | O_NONBLOCK;
  const int file = ::open(path.c_str(), flags | more_flags, 0644);
  if (file < 0 && errno == ELOOP) {
    refuse(path + ": a symbolic link; delete it or name another file with --out");
  }
  if (file < 0) cannot_write(path);
  struct stat found;
  if (::fstat(file, &found) == 0 && S_ISREG(found.st_mode)) return file;
  ::close(file);
  refuse(path + ": not a regular file; name another one with --out");
}

std::string read_all(int file, const std::string& path) {
  std::string data;
  std::vector<char> block(std::size_t{1} << 16);
  while (true) {
    const ssize_t n = ::pread(file, block.data(), block.size(), static_cast<off_t>(data.size()));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) cannot_read(path);
    if (n == 0) return data;
    data.append(block.data(), static_cast<std::size_t>(n));
  }
}

// Writes all of it: a full disk takes a part and says so only next time.
void write_all(int file, const std::string& data, const std::string& path) {
  std::size_t done = 0;
  while (done < data.size()) {
    const ssize_t n = ::write(file, data.data() + done, data.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) cannot_write(path);
    done += static_cast<std::size_t>(n);
  }
}

char byte_at(int file, off_t place, const std::string& path) {
  char found = 0;
  while (::pread(file, &found, 1, place) < 0) {
    if (errno != EINTR) cannot_read(path);
  }
  return found;
}

bool is_digit(char c) { return c >= '0' && c <= '9'; }

// Whether a killed run may have left this of `header`, written at another time.
bool is_torn_header(const std::string& text, const std::string& header) {
  const std::size_t start = header.find(time_mark) + time_mark.size();
  const std::size_t stop = header.find('"', start);
  if (text.size() > header.size()) return false;
  for (std::size_t k = 0; k < text.size(); ++k) {
    const bool of_time = start <= k && k < stop && is_digit(text[k]) && is_digit(header[k]);
    if (text[k] != header[k] && !of_time) return false;
  }
  return true;
}

// A null where the line is no JSON.
Json parsed(const std::string& line) {
  try {
    return parse_json(reinterpret_cast<const unsigned char*>(line.data()), line.size());
  } catch (const Error&) {
    return {};
  }
}

bool same_kinds(const Json& a, const Json& b) {
  if (a.kind != Json::Kind::object || a.fields.size() != b.fields.size()) return false;
  for (const auto& [name, value] : b.fields) {
    const auto found = a.fields.find(name);
    if (found == a.fields.end() || found->second.kind != value.kind) return false;
  }
  return true;
}

bool is_samples(const Json& line, const std::set<std::string>& graphs) {
  if (line.kind != Json::Kind::object || line.fields.size() != 3) return false;
  try {
    line.field("round").natural("round");
    if (graphs.count(line.field("graph").string("graph")) == 0) return false;
    const Json& us = line.field("us");
    for (const Json& value : us.items) {
      const double found = real(value, "us");
      if (!(found > 0 && found <= longest_us)) return false;
    }
    return us.kind == Json::Kind::array && !us.items.empty();
  } catch (const Error&) {
    return false;
  }
}

}  // namespace

Results::Results(const std::string& path, const std::string& header,
                 const std::set<std::string>& graphs)
    : path_(path), file_(open_regular(path, 0)) {
  try {
    lock();
    resume(header, graphs);
  } catch (...) {
    ::close(file_);
    throw;
  }
}

Results::~Results() { ::close(file_); }

// Keeps other runs off the file until this one ends; waits a moment for one that is ending.
void Results::lock() {
  const auto until = std::chrono::steady_clock::now() + lock_time;
  while (::flock(file_, LOCK_EX | LOCK_NB) != 0) {
    // A file system without locks, as that of an SD card may be.
    if (errno != EWOULDBLOCK && errno != EINTR) return;
    if (std::chrono::steady_clock::now() > until) {
      refuse(path_ + ": " + holder() +
             " is writing to it; wait for it to end, or name another file with --out");
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
}

// Whoever holds the lock, by number where Linux tells it.
std::string Results::holder() const {
  struct stat found;
  if (::fstat(file_, &found) != 0) return "another process";
  const std::string inode = ":" + std::to_string(found.st_ino);
  std::ifstream locks("/proc/locks");
  for (std::string line; std::getline(locks, line);) {
    std::istringstream words(line);
    std::vector<std::string> fields;
    for (std::string word; words >> word;) fields.push_back(word);
    if (fields.size() < 6 || fields[1] != "FLOCK" || fields[5].size() < inode.size()) continue;
    if (fields[5].compare(fields[5].size() - inode.size(), inode.size(), inode) == 0) {
      return "process " + fields[4];
    }
  }
  return "another process";
}

void Results::resume(const std::string& header, const std::set<std::string>& graphs) {
  const std::string data = read_all(file_, path_);
  const Json own = parsed(header);
  const std::size_t end = data.rfind('\n');
  const std::size_t whole = end == std::string::npos ? 0 : end + 1;
  const std::string torn = data.substr(whole);
  std::size_t number = 0;
  for (std::size_t start = 0; start < whole;) {
    const std::size_t stop = data.find('\n', start);
    const std::string line = data.substr(start, stop - start);
    if (++number == 1) check_header(line, own);
    if (number > 1) read_line(line, number, graphs);
    start = stop + 1;
  }
  if (whole == 0 && !is_torn_header(torn, header)) {
    refuse(path_ + ": holds no results to go on with; name another file with --out");
  }
  // The last line of a killed run; what is appended must not stick to it.
  if (!torn.empty() && ::ftruncate(file_, static_cast<off_t>(whole)) != 0) cannot_write(path_);
  if (whole != 0) return;
  append(header + "\n");
  header_ = own;
}

void Results::check_header(const std::string& line, const Json& own) {
  Json found = parsed(line);
  if (found.kind == Json::Kind::object && found.fields.count("kit_sha256") != 0 &&
      found.fields.count("environment") == 0) {
    refuse(path_ + ": results of bench.py; name another file with --out");
  }
  if (!same_kinds(found, own)) {
    refuse(path_ + ", line 1: damaged, or of another tool; delete the file and run again, or "
                   "name another one with --out");
  }
  for (const char* told :
       {"kit_sha256", "device", "runtime", "threads", "power_mode", "seconds", "environment"}) {
    if (!same(found.field(told), own.field(told))) {
      refuse(path_ + ": results of another kit, device, mode, governor, --cpus or --seconds; name "
                     "a file with --out");
    }
  }
  for (const char* share : {"ci_target", "max_seconds"}) {
    const double value = real(found.field(share), share);
    if (!(value > 0 && value < longest_us)) {
      refuse(path_ + ", line 1: " + share + " is out of range; delete the file and run again");
    }
  }
  const std::string& clock = found.field("clock").text;
  if (clock != own.field("clock").text) {
    refuse(path_ + ", line 1: another clock; delete the file and run again");
  }
  header_ = std::move(found);
}

void Results::read_line(const std::string& line, std::size_t number,
                        const std::set<std::string>& graphs) {
  const std::string where = path_ + ", line " + std::to_string(number);
  const Json found = parsed(line);
  if (found.fields.count("kit_sha256") != 0) {
    refuse(where + ": a second header; delete the file and run again");
  }
  if (!is_samples(found, graphs)) refuse(where + ": damaged; delete the line and run again");
  const Turn turn{found.field("graph").text, found.field("round").natural("round")};
  Samples us;
  for (const Json& value : found.field("us").items) us.push_back(real(value, "us"));
  if (!done_.emplace(turn, std::move(us)).second) {
    refuse(where + ": graph " + turn.first + ", round " + std::to_string(turn.second) +
           ", is there twice; delete the line and run again");
  }
}

std::pair<Results::Place, Results::Place> Results::rounds(const std::string& graph) const {
  return {done_.lower_bound({graph, 0}), done_.upper_bound({graph, UINT64_MAX})};
}

std::uint64_t Results::count(const std::string& graph) const {
  const auto [first, last] = rounds(graph);
  return static_cast<std::uint64_t>(std::distance(first, last));
}

std::uint64_t Results::next_round(const std::string& graph) const {
  const auto [first, last] = rounds(graph);
  return first == last ? 0 : std::prev(last)->first.second + 1;
}

Samples Results::samples(const std::string& graph) const {
  Samples all;
  const auto [first, last] = rounds(graph);
  for (auto each = first; each != last; ++each) {
    all.insert(all.end(), each->second.begin(), each->second.end());
  }
  return all;
}

void Results::keep(const std::string& graph, std::uint64_t round, const Samples& us) {
  done_[{graph, round}] = us;
  append("{\"graph\":" + quoted(graph) + ",\"round\":" + std::to_string(round) +
         ",\"us\":" + numbers_text(us) + "}\n");
}

void Results::append(const std::string& data) { write_all(file_, data, path_); }

void append_line(const std::string& path, const std::string& line) {
  // Nobody named this file: a link may lead to one of something else.
  const int file = open_regular(path, O_NOFOLLOW);
  try {
    const off_t size = ::lseek(file, 0, SEEK_END);
    if (size > 0 && byte_at(file, 0, path) != '{') {
      refuse(path + ": holds no readings of this tool; move it or name another file with --out");
    }
    const bool torn = size > 0 && byte_at(file, size - 1, path) != '\n';
    write_all(file, (torn ? "\n" : "") + line + "\n", path);
  } catch (...) {
    ::close(file);
    throw;
  }
  if (::close(file) != 0) cannot_write(path);
}

}  // namespace edgeqdm::bench
