#include "options.h"

#include <algorithm>
#include <cstdlib>

#include "error.h"
#include "files.h"

namespace edgeqdm::bench {
namespace {

constexpr edgeqdm_status usage_error = static_cast<edgeqdm_status>(2);
constexpr unsigned long max_threads = 256;
constexpr double max_limit = 1e6;
constexpr std::size_t longest_text = 200;

[[noreturn]] void misused(const std::string& message) { throw Error(usage_error, message); }

// Arguments one by one; the value of an option is in it, behind `=`, or the next argument.
class Reader {
 public:
  Reader(int n, char** values) : n_(n), values_(values) {}

  bool next() {
    if (++at_ >= n_) return false;
    word_ = values_[at_];
    const std::size_t equals = word_.find('=');
    has_value_ = word_.compare(0, 2, "--") == 0 && equals != std::string::npos;
    if (has_value_) {
      value_ = word_.substr(equals + 1);
      word_.erase(equals);
    }
    return true;
  }

  const std::string& word() const { return word_; }
  bool has_value() const { return has_value_; }

  std::string value() {
    if (has_value_) return value_;
    if (++at_ >= n_) misused("argument " + word_ + ": expected one argument");
    return values_[at_];
  }

 private:
  int n_;
  char** values_;
  int at_ = 0;
  bool has_value_ = false;
  std::string word_, value_;
};

unsigned parse_threads(const std::string& text) {
  char* end = nullptr;
  const bool digits = !text.empty() && text.find_first_not_of("0123456789") == text.npos;
  const unsigned long found = digits ? std::strtoul(text.c_str(), &end, 10) : 0;
  if (found > max_threads) {
    throw Error(EDGEQDM_INPUT, "argument --threads: found " + text.substr(0, 40) + ", at most " +
                                   std::to_string(max_threads) + "; give fewer");
  }
  if (found < 1) {
    misused("argument --threads: expected a number from 1 on, found '" + printable(text) + "'");
  }
  return static_cast<unsigned>(found);
}

double parse_seconds(const std::string& option, const std::string& text) {
  char* end = nullptr;
  const bool plain_number = !text.empty() && text.find_first_not_of("0123456789.eE+-") == text.npos;
  const double found = plain_number ? std::strtod(text.c_str(), &end) : -1.0;
  if (!plain_number || *end != '\0' || !(found > 0 && found <= max_limit)) {
    misused("argument " + option + ": expected seconds above 0, found '" + printable(text) + "'");
  }
  return found;
}

// A text that a profile can hold.
std::string parse_text(const std::string& option, const std::string& text) {
  const bool good = !text.empty() && text.size() <= longest_text &&
                    std::all_of(text.begin(), text.end(), [](char c) {
                      return c >= ' ' && c <= '~';
                    });
  if (!good) misused("argument " + option + ": give 1 to 200 printable ASCII characters");
  return text;
}

bool read_switch(const Reader& reader, Options& options) {
  if (reader.has_value()) return false;
  if (reader.word() == "--package") return options.package = true;
  if (reader.word() == "--emulator") return options.emulator = true;
  if (reader.word() == "--help" || reader.word() == "-h") return options.help = true;
  if (reader.word() == "--version") return options.version = true;
  return false;
}

void read_option(Reader& reader, Options& options) {
  const std::string option = reader.word();
  if (option == "--threads") {
    options.threads = parse_threads(reader.value());
  } else if (option == "--cpus") {
    options.cpus = parse_cpus(reader.value());
  } else if (option == "--name") {
    options.name = parse_text(option, reader.value());
  } else if (option == "--power-mode") {
    options.power_mode = parse_text(option, reader.value());
  } else if (option == "--seconds" || option == "--max-seconds") {
    (option == "--seconds" ? options.seconds : options.max_seconds) =
        parse_seconds(option, reader.value());
  } else if (option == "--library") {
    options.library = reader.value();
  } else if (option == "--out") {
    options.out = reader.value();
  } else if (option.empty() || option[0] == '-' || !options.folder.empty()) {
    misused("unrecognized arguments: " + printable(option));
  } else {
    options.folder = reader.has_value() ? option + "=" + reader.value() : option;
  }
}

}  // namespace

const char* const help_text =
    "usage: edgeqdm-bench KIT [options]\n"
    "       edgeqdm-bench PACKAGE --package [options]\n"
    "\n"
    "Times the graphs of a benchmark kit on this device, as the kit's bench.py does. Stopped at\n"
    "any moment, the same command goes on. Of the results `edgeqdm profile import` makes a profile.\n"
    "\n"
    "  --threads N       default 1: CPU time of one thread is counted, else elapsed time\n"
    "  --cpus LIST       to run on, such as 4-7 or 0,2; default: the fastest ones\n"
    "  --name TEXT       of the device; default: its board or processor\n"
    "  --power-mode TEXT default unknown\n"
    "  --seconds S       least per graph, default 1\n"
    "  --max-seconds S   most per graph, default 6\n"
    "  --emulator        say that this is no real device\n"
    "  --out FILE        default: results-N.jsonl in the kit, N the number of threads;\n"
    "                    with --package: standard output\n"
    "  --library FILE    of ONNX Runtime, e.g. libonnxruntime.so; default: beside this program\n"
    "  --package         time whole evaluations of a package, by phase, and print JSON\n"
    "  --version\n";

Options parse_options(int n, char** values) {
  Options options;
  Reader reader(n, values);
  while (reader.next()) {
    if (!read_switch(reader, options)) read_option(reader, options);
  }
  if (options.help || options.version) return options;
  if (options.folder.empty()) misused("give the folder of a kit, or --help");
  if (options.max_seconds < options.seconds) misused("--max-seconds is less than --seconds");
  return options;
}

}  // namespace edgeqdm::bench
