// edgeqdm-run: sampling from a package at the command line, like run.py beside it.
#include <unistd.h>

#include <chrono>
#include <climits>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "edgeqdm.h"
#include "error.h"
#include "files.h"
#include "image.h"
#include "tensors.h"

namespace {

using edgeqdm::Error;
using edgeqdm::printable;

constexpr int exit_usage = 2;
constexpr edgeqdm_status usage_error = static_cast<edgeqdm_status>(exit_usage);
constexpr std::uint64_t max_embedding_bytes = std::uint64_t{1} << 32;

// The signal that asked to stop, 0 if none did: all that a handler may touch.
volatile std::sig_atomic_t stopped_by = 0;

extern "C" void on_stop(int signal) { stopped_by = signal; }

extern "C" void leave_at_once(int signal) { ::_exit(128 + signal); }

// Ctrl-C and SIGTERM; `flags` are those of sigaction.
void on_stop_signals(void (*handler)(int), int flags) {
  struct sigaction action{};
  action.sa_handler = handler;
  action.sa_flags = flags;
  for (int signal : {SIGINT, SIGTERM}) ::sigaction(signal, &action, nullptr);
}

constexpr const char* help =
    "usage: edgeqdm-run [--package DIR] --out FILE [options]\n"
    "       edgeqdm-run [--package DIR] --self-test\n"
    "\n"
    "  --package DIR     the package; default: the one this program lies in\n"
    "  --out FILE        PNG file to write; PGM or PPM where it ends in .pgm or .ppm\n"
    "  --latents FILE    also write the raw samples as .npy\n"
    "  --label LABELS    label or labels, by number or name: 3 or 3,5 or Bag\n"
    "  --count N         number of images\n"
    "  --embedding FILE  .npy file with one embedding per image\n"
    "  --seed N          default 0\n"
    "  --threads N       default 1\n"
    "  --columns N       images in a row of the sheet; default 10\n"
    "  --provider NAME   of ONNX Runtime, e.g. XNNPACK; default cpu\n"
    "  --library FILE    of ONNX Runtime, e.g. libonnxruntime.so\n"
    "  --self-test       replay the golden run and exit\n"
    "  --quiet           no progress and no summary\n"
    "  --version\n";

struct Arguments {
  std::string package, out, latents, label, embedding, library, provider = "cpu";
  bool has_label = false, has_count = false;
  std::uint64_t seed = 0;
  std::uint32_t count = 0, threads = 1, columns = 10;
  bool self_test = false, quiet = false;
};

[[noreturn]] void refuse(const std::string& message) { throw Error(EDGEQDM_INPUT, message); }

struct Whole {
  bool negative = false;
  bool overflow = false;  // the magnitude is 2^64 or more, `value` means nothing
  std::uint64_t value = 0;
};

// A whole number in decimal digits, if it is one.
std::optional<Whole> parse_whole(const std::string& text) {
  const std::size_t sign = !text.empty() && (text[0] == '-' || text[0] == '+') ? 1 : 0;
  if (text.size() == sign) return std::nullopt;
  Whole found;
  for (std::size_t k = sign; k < text.size(); ++k) {
    if (text[k] < '0' || text[k] > '9') return std::nullopt;
    const auto digit = static_cast<std::uint64_t>(text[k] - '0');
    found.overflow = found.overflow || found.value > (UINT64_MAX - digit) / 10;
    if (!found.overflow) found.value = 10 * found.value + digit;
  }
  found.negative = text[0] == '-' && (found.overflow || found.value != 0);
  return found;
}

Whole parse_integer(const char* option, const std::string& text) {
  if (const std::optional<Whole> found = parse_whole(text)) return *found;
  throw Error(usage_error, std::string("argument ") + option + ": invalid int value: '" +
                               printable(text) + "'");
}

std::uint64_t parse_seed(const std::string& text) {
  const Whole found = parse_integer("--seed", text);
  if (found.negative || found.overflow) {
    refuse("seed must be in 0..2**64 - 1, but it is " + printable(text));
  }
  return found.value;
}

std::uint32_t parse_count(const char* option, const std::string& text) {
  const Whole found = parse_integer(option, text);
  if (found.negative || (found.value == 0 && !found.overflow)) {
    refuse(std::string(option) + " must be at least 1, got " + printable(text));
  }
  if (found.overflow || found.value > INT32_MAX) {
    refuse(std::string(option) + " is too large: " + printable(text));
  }
  return static_cast<std::uint32_t>(found.value);
}

// The value of `option`, from the same argument behind `=` or from the next one.
class Reader {
 public:
  Reader(int n, char** values) : n_(n), values_(values) {}

  bool next() {
    if (++at_ >= n_) return false;
    word_ = values_[at_];
    const std::size_t equals = word_.find('=');
    has_value_ = word_.rfind("--", 0) == 0 && equals != std::string::npos;
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
    if (++at_ >= n_) throw Error(usage_error, "argument " + word_ + ": expected one argument");
    return values_[at_];
  }

 private:
  int n_;
  char** values_;
  int at_ = 0;
  std::string word_, value_;
  bool has_value_ = false;
};

bool read_switch(const Reader& reader, Arguments& arguments) {
  if (reader.has_value()) return false;
  if (reader.word() == "--self-test") return arguments.self_test = true;
  if (reader.word() == "--quiet") return arguments.quiet = true;
  return false;
}

void read_option(Reader& reader, Arguments& arguments) {
  const std::string option = reader.word();
  if (option == "--package") {
    arguments.package = reader.value();
  } else if (option == "--out") {
    arguments.out = reader.value();
  } else if (option == "--latents") {
    arguments.latents = reader.value();
  } else if (option == "--label") {
    arguments.label = reader.value();
    arguments.has_label = true;
  } else if (option == "--embedding") {
    arguments.embedding = reader.value();
  } else if (option == "--library") {
    arguments.library = reader.value();
  } else if (option == "--provider") {
    arguments.provider = reader.value();
  } else if (option == "--seed") {
    arguments.seed = parse_seed(reader.value());
  } else if (option == "--count") {
    arguments.count = parse_count("--count", reader.value());
    arguments.has_count = true;
  } else if (option == "--threads") {
    arguments.threads = parse_count("--threads", reader.value());
  } else if (option == "--columns") {
    arguments.columns = parse_count("--columns", reader.value());
  } else {
    throw Error(usage_error, "unrecognized arguments: " + printable(option));
  }
}

Arguments parse_arguments(int n, char** values) {
  Arguments arguments;
  Reader reader(n, values);
  while (reader.next()) {
    if (!read_switch(reader, arguments)) read_option(reader, arguments);
  }
  return arguments;
}

// The nearest folder above this program that has a manifest: it is built inside the package.
std::string own_package(const char* program) {
  char place[PATH_MAX];
  const ssize_t n = ::readlink("/proc/self/exe", place, sizeof place);
  std::string folder = n > 0 ? std::string(place, static_cast<std::size_t>(n)) : program;
  for (int up = 0; up < 5; ++up) {
    const std::size_t slash = folder.rfind('/');
    if (slash == std::string::npos) break;
    folder.erase(slash);
    if (::access((folder + "/manifest.json").c_str(), F_OK) == 0) return folder;
  }
  throw Error(usage_error, "no package around this program: give --package DIR");
}

struct Closer {
  void operator()(edgeqdm_session* session) const noexcept { edgeqdm_close(session); }
};
using Session = std::unique_ptr<edgeqdm_session, Closer>;

void check(const Session& session, edgeqdm_status status) {
  if (status != EDGEQDM_OK) throw Error(status, edgeqdm_message(session.get()));
}

Session open_package(const std::string& folder, const Arguments& arguments) {
  char message[4096] = "";
  edgeqdm_options options{};
  options.threads = static_cast<int>(arguments.threads);
  options.provider = arguments.provider.c_str();
  if (!arguments.library.empty()) options.library = arguments.library.c_str();
  options.message = message;
  options.message_size = sizeof message;
  edgeqdm_session* session = nullptr;
  const edgeqdm_status status = edgeqdm_open(folder.c_str(), &options, &session);
  if (status != EDGEQDM_OK) throw Error(status, message);
  return Session(session);
}

// As Python's json writes a float: the fewest digits that read back to the same number.
std::string shown(double value) {
  if (value != value) return "NaN";
  if (value > 1.7976931348623157e308) return "Infinity";
  char text[40];
  for (int digits = 1; digits <= 17; ++digits) {
    std::snprintf(text, sizeof text, "%.*g", digits, value);
    if (std::strtod(text, nullptr) == value) break;
  }
  const std::string found = text;
  return found.find_first_of(".e") == std::string::npos ? found + ".0" : found;
}

void report_self_test(const Session& session) {
  edgeqdm_info info;
  check(session, edgeqdm_describe(session.get(), &info));
  std::vector<double> deviation(info.steps);
  double sampler = 0.0;
  int passed = 0;
  check(session, edgeqdm_self_test(session.get(), deviation.data(), deviation.size(), &sampler,
                                   &passed));
  std::string list;
  for (double value : deviation) list += ", " + shown(value);
  std::printf("{\"passed\": %s, \"deviation\": [%s], \"sampler\": %s}\n",
              passed != 0 ? "true" : "false", list.substr(2).c_str(), shown(sampler).c_str());
  if (passed == 0) {
    throw Error(EDGEQDM_VERIFY, "self-test failed: outputs differ from the golden run");
  }
}

std::string lower(std::string text) {
  for (char& c : text) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  return text;
}

std::vector<std::string> label_names(const Session& session, const edgeqdm_info& info) {
  std::vector<std::string> names;
  for (std::uint32_t label = 0; label < info.label_names; ++label) {
    const char* name = nullptr;
    std::size_t length = 0;
    check(session, edgeqdm_label_name(session.get(), label, &name, &length));
    names.emplace_back(name, length);
  }
  return names;
}

std::string trimmed(const std::string& text) {
  const char* const blanks = " \t\n\r\f\v";
  const std::size_t first = text.find_first_not_of(blanks);
  if (first == std::string::npos) return "";
  return text.substr(first, text.find_last_not_of(blanks) - first + 1);
}

std::int64_t parse_label(const std::string& text, const std::vector<std::string>& names,
                         const std::string& all, const edgeqdm_info& info) {
  const std::string range = "0.." + std::to_string(info.labels - 1);
  // The last of equal names, as in a Python dictionary.
  for (std::size_t k = names.size(); k > 0; --k) {
    if (lower(names[k - 1]) == lower(text)) return static_cast<std::int64_t>(k - 1);
  }
  const std::optional<Whole> found = parse_whole(text);
  if (!found) {
    std::string known;
    for (const std::string& name : names) known += ", " + name;
    refuse("unknown label in '" + all + "'; known: " + (known.empty() ? range : known.substr(2)));
  }
  if (found->negative || found->overflow || found->value >= info.labels) {
    refuse("label " + text + " is out of range " + range);
  }
  return static_cast<std::int64_t>(found->value);
}

// One label per image; all labels once where none is asked for.
std::vector<std::int64_t> parse_labels(const Session& session, const edgeqdm_info& info,
                                       const Arguments& arguments) {
  std::vector<std::int64_t> labels;
  if (!arguments.has_label) {
    const std::uint32_t n = arguments.has_count ? arguments.count : info.labels;
    for (std::uint32_t k = 0; k < n; ++k) labels.push_back(k % info.labels);
    return labels;
  }
  const std::vector<std::string> names = label_names(session, info);
  const std::string& text = arguments.label;
  for (std::size_t start = 0; start <= text.size();) {
    const std::size_t comma = std::min(text.find(',', start), text.size());
    labels.push_back(parse_label(trimmed(text.substr(start, comma - start)), names, text, info));
    start = comma + 1;
  }
  if (labels.size() > 1 && arguments.has_count && arguments.count != labels.size()) {
    refuse("--count " + std::to_string(arguments.count) + " contradicts " +
           std::to_string(labels.size()) + " labels");
  }
  if (labels.size() == 1 && arguments.has_count) labels.resize(arguments.count, labels[0]);
  return labels;
}

std::string shape_of(const std::vector<std::uint64_t>& shape) {
  std::string text;
  for (std::uint64_t size : shape) text += ", " + std::to_string(size);
  return "(" + text.substr(2) + (shape.size() == 1 ? ",)" : ")");
}

edgeqdm::Tensor read_embeddings(const std::string& path, const edgeqdm_info& info) {
  edgeqdm::Tensor found =
      edgeqdm::parse_npy(edgeqdm::read_file(path, max_embedding_bytes, EDGEQDM_INPUT), path);
  if (info.conditioning == EDGEQDM_NONE) refuse("this model takes no label and no embedding");
  std::vector<std::uint64_t> wanted = {found.shape[0]};
  wanted.insert(wanted.end(), info.embedding_shape, info.embedding_shape + info.embedding_rank);
  if (found.shape != wanted) {
    refuse("conditioning must be " + shape_of(wanted) + ", got " + shape_of(found.shape));
  }
  if (info.conditioning == EDGEQDM_LABEL) refuse("this model needs a label, not float32");
  if (found.shape[0] > INT32_MAX) refuse("too many embeddings");
  return found;
}

struct Progress {
  bool shown;
  std::chrono::steady_clock::time_point started;
};

int on_step(std::uint32_t done, std::uint32_t steps, void* context) {
  const auto& progress = *static_cast<const Progress*>(context);
  if (progress.shown) {
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - progress.started;
    const double left = spent.count() / done * (steps - done);
    std::fprintf(stderr, "\rstep %u/%u, %.0f s left ", done, steps, left);
    if (done == steps) std::fputc('\n', stderr);
  }
  return stopped_by;
}

edgeqdm::PixelShape pixels_of(const edgeqdm_info& info) {
  return {info.pixel_channels, info.pixel_height, info.pixel_width};
}

// Before there is any work to lose.
void check_outputs(const Arguments& arguments, const edgeqdm_info& info) {
  edgeqdm::check_ending(info.pixel_channels, arguments.out);
  const std::string out = edgeqdm::writable_target(arguments.out);
  if (arguments.latents.empty() || edgeqdm::writable_target(arguments.latents) != out) return;
  refuse("--out and --latents are the same file: " + printable(arguments.out));
}

void stop_if_asked() {
  if (stopped_by != 0) throw Error(EDGEQDM_CANCELLED, "cancelled");
}

void write_results(const Session& session, const Arguments& arguments) {
  // From here on no signal ends the program half-way through a file, leaving its beginning.
  on_stop_signals(on_stop, 0);
  stop_if_asked();
  check(session, edgeqdm_write_image(session.get(), arguments.out.c_str(), arguments.columns));
  if (arguments.latents.empty()) return;
  stop_if_asked();
  check(session, edgeqdm_write_latents(session.get(), arguments.latents.c_str()));
}

void draw(const Session& session, const Arguments& arguments) {
  edgeqdm_info info;
  check(session, edgeqdm_describe(session.get(), &info));
  std::vector<std::int64_t> labels;
  edgeqdm::Tensor embeddings;
  std::uint32_t n_images = arguments.has_count ? arguments.count : 1;
  edgeqdm::check_sheet(pixels_of(info), n_images, arguments.columns);
  if (!arguments.embedding.empty()) {
    embeddings = read_embeddings(arguments.embedding, info);
    n_images = static_cast<std::uint32_t>(embeddings.shape[0]);
  } else if (info.conditioning == EDGEQDM_LABEL) {
    labels = parse_labels(session, info, arguments);
    n_images = static_cast<std::uint32_t>(labels.size());
  } else if (arguments.has_label) {
    refuse("this model takes no label");
  }
  edgeqdm::check_sheet(pixels_of(info), n_images, arguments.columns);
  check_outputs(arguments, info);
  Progress progress{!arguments.quiet && ::isatty(STDERR_FILENO) != 0,
                    std::chrono::steady_clock::now()};
  check(session, edgeqdm_begin(session.get(), arguments.seed, 0, n_images,
                               labels.empty() ? nullptr : labels.data(),
                               embeddings.floats.empty() ? nullptr : embeddings.floats.data()));
  check(session, edgeqdm_sample(session.get(), on_step, &progress));
  const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - progress.started;
  write_results(session, arguments);
  if (!arguments.quiet) {
    std::printf("%s: %u images, seed %llu, %.2f s\n", arguments.out.c_str(), n_images,
                static_cast<unsigned long long>(arguments.seed), spent.count());
  }
}

void run(const Arguments& arguments, const char* program) {
  const std::string folder = arguments.package.empty() ? own_package(program) : arguments.package;
  if (!arguments.self_test && arguments.out.empty()) {
    throw Error(usage_error, "nothing to do: give --out FILE.png or --self-test");
  }
  if (!arguments.embedding.empty() && (arguments.has_label || arguments.has_count)) {
    refuse("--embedding decides alone: leave --label and --count out");
  }
  const Session session = open_package(folder, arguments);
  if (arguments.self_test) {
    // It writes nothing, and has no step at which to ask.
    on_stop_signals(leave_at_once, 0);
    stop_if_asked();
    report_self_test(session);
  } else {
    draw(session, arguments);
  }
}

// Asked to stop once: a second time ends the program at once, should a step take long. A full disk
// and a closed pipe are errors of the calls that meet them, not signals.
void set_signals() {
  on_stop_signals(on_stop, static_cast<int>(SA_RESETHAND));
  std::signal(SIGXFSZ, SIG_IGN);
  std::signal(SIGPIPE, SIG_IGN);
}

int fail(int status, const char* message) {
  std::fprintf(stderr, "error: %s\n", message);
  return status;
}

}  // namespace

int main(int n, char** values) {
  edgeqdm::reserve_standard_streams();
  set_signals();
  try {
    for (int k = 1; k < n; ++k) {
      if (std::strcmp(values[k], "--help") == 0 || std::strcmp(values[k], "-h") == 0) {
        return std::fputs(help, stdout) < 0 ? EDGEQDM_OUTPUT : EDGEQDM_OK;
      }
      if (std::strcmp(values[k], "--version") == 0) {
        return std::puts(edgeqdm_version()) < 0 ? EDGEQDM_OUTPUT : EDGEQDM_OK;
      }
    }
    run(parse_arguments(n, values), values[0]);
  } catch (const Error& error) {
    if (error.status() == EDGEQDM_CANCELLED) return 128 + stopped_by;
    return fail(error.status(), printable(error.what()).c_str());
  } catch (const std::bad_alloc&) {
    return fail(EDGEQDM_RESOURCE, "out of memory - draw fewer images at once");
  } catch (const std::length_error&) {
    return fail(EDGEQDM_RESOURCE, "out of memory - draw fewer images at once");
  } catch (const std::exception& error) {
    return fail(EDGEQDM_INTERNAL, ("internal: " + printable(error.what())).c_str());
  }
  if (std::fflush(stdout) != 0) return fail(EDGEQDM_OUTPUT, "standard output cannot be written");
  return EDGEQDM_OK;
}
