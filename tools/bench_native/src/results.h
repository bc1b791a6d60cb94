// A results file: a header, then one line per graph and round. It is whole after every line, held
// by one process at a time, and gone on with after a kill.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>

#include "json.h"
#include "protocol.h"

namespace edgeqdm::bench {

using Turn = std::pair<std::string, std::uint64_t>;  // graph and round

class Results {
 public:
  // Opens or makes the file and takes its lock. `header` is the line that a new file begins with;
  // the header of a file that is there must tell the same. Throws Error: INPUT for a file that
  // cannot be gone on with, OUTPUT for one that cannot be written.
  Results(const std::string& path, const std::string& header, const std::set<std::string>& graphs);
  ~Results();
  Results(const Results&) = delete;
  Results& operator=(const Results&) = delete;

  // That of the file, which may be older than this run.
  const Json& header() const noexcept { return header_; }
  const std::map<Turn, Samples>& done() const noexcept { return done_; }
  bool has(const std::string& graph, std::uint64_t round) const {
    return done_.count({graph, round}) != 0;
  }
  // Rounds of a graph that are there.
  std::uint64_t count(const std::string& graph) const;
  // The one behind the highest that is there: a line may have been deleted.
  std::uint64_t next_round(const std::string& graph) const;
  // All samples of a graph, by round.
  Samples samples(const std::string& graph) const;

  // Writes a line down.
  void keep(const std::string& graph, std::uint64_t round, const Samples& us);

 private:
  using Place = std::map<Turn, Samples>::const_iterator;

  // Those of a graph, by round.
  std::pair<Place, Place> rounds(const std::string& graph) const;
  void lock();
  void resume(const std::string& header, const std::set<std::string>& graphs);
  void check_header(const std::string& line, const Json& own);
  void read_line(const std::string& line, std::size_t number, const std::set<std::string>& graphs);
  void append(const std::string& data);
  std::string holder() const;

  std::string path_;
  int file_ = -1;
  Json header_;
  std::map<Turn, Samples> done_;
};

// Adds a line to a file of such lines that nobody goes on with. Throws Error: INPUT for a file of
// something else, OUTPUT for one that cannot be written.
void append_line(const std::string& path, const std::string& line);

}  // namespace edgeqdm::bench
