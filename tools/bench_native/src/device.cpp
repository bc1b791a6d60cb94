#include "device.h"

#include <dirent.h>
#include <sched.h>
#include <sys/utsname.h>

#include <algorithm>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <functional>
#include <set>
#include <sstream>

#include "error.h"
#include "json_text.h"

namespace edgeqdm::bench {
namespace {

constexpr std::size_t longest_name = 200;
constexpr unsigned max_cpus = 4096;
constexpr double hot_celsius = 80.0;
constexpr double low_battery_percent = 30.0;
constexpr edgeqdm_status usage_error = static_cast<edgeqdm_status>(2);
const char* const known_features[] = {"avx2",     "avx512f", "avx512_vnni", "avx_vnni", "amx_int8",
                                      "asimddp",  "i8mm",    "sve",         "bf16"};

// "" where it cannot be read.
std::string text_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  if (file) text << file.rdbuf();
  return text.str();
}

std::string stripped(const std::string& text) {
  const char* blank = " \t\r\n\f\v";
  const std::size_t first = text.find_first_not_of(blank);
  if (first == std::string::npos) return "";
  return text.substr(first, text.find_last_not_of(blank) - first + 1);
}

// False where the file holds no whole number.
bool read_number(const std::string& path, long long* value) {
  const std::string text = stripped(text_of(path));
  char* end = nullptr;
  *value = std::strtoll(text.c_str(), &end, 10);
  return !text.empty() && *end == '\0';
}

// Names of the entries of a folder that begin with `start`, sorted.
std::vector<std::string> entries(const std::string& folder, const std::string& start) {
  std::vector<std::string> names;
  DIR* opened = ::opendir(folder.c_str());
  if (opened == nullptr) return names;
  while (const dirent* entry = ::readdir(opened)) {
    const std::string name = entry->d_name;
    if (name[0] != '.' && name.compare(0, start.size(), start) == 0) names.push_back(name);
  }
  ::closedir(opened);
  std::sort(names.begin(), names.end());
  return names;
}

std::vector<std::string> values(const std::string& cpuinfo, const std::string& wanted) {
  std::vector<std::string> found;
  std::istringstream lines(cpuinfo);
  for (std::string line; std::getline(lines, line);) {
    const std::size_t colon = std::min(line.find(':'), line.size());
    if (stripped(line.substr(0, colon)) != wanted) continue;
    found.push_back(colon == line.size() ? "" : stripped(line.substr(colon + 1)));
  }
  return found;
}

// Architecture and kinds of cores, in numbers: `aarch64 0x41/0xd05 0x41/0xd0b`.
std::string arm_cores(const std::string& cpuinfo, const std::string& machine) {
  const std::vector<std::string> implementers = values(cpuinfo, "CPU implementer");
  const std::vector<std::string> parts = values(cpuinfo, "CPU part");
  std::set<std::string> kinds;
  for (std::size_t k = 0; k < std::min(implementers.size(), parts.size()); ++k) {
    kinds.insert(implementers[k] + "/" + parts[k]);
  }
  std::string name = kinds.empty() ? "" : machine;
  for (const std::string& kind : kinds) name += " " + kind;
  return name;
}

std::vector<std::string> words(const std::vector<std::string>& texts) {
  std::vector<std::string> found;
  for (const std::string& text : texts) {
    std::istringstream stream(text);
    for (std::string word; stream >> word;) found.push_back(word);
  }
  return found;
}

std::string frequency_file(const std::string& root, unsigned cpu, const char* name) {
  return root + "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/cpufreq/" + name;
}

std::uint64_t khz_of(const std::string& root, unsigned cpu, const char* name) {
  long long khz = 0;
  const bool known = read_number(frequency_file(root, cpu, name), &khz) && khz > 0;
  return known ? static_cast<std::uint64_t>(khz) : 0;
}

std::vector<Zone> read_zones(const std::string& root) {
  const std::string folder = root + "/sys/class/thermal";
  std::vector<Zone> zones;
  for (const std::string& entry : entries(folder, "thermal_zone")) {
    long long raw = 0;
    if (!read_number(folder + "/" + entry + "/temp", &raw)) continue;
    // Thousandths of a degree by the rule, whole degrees by some drivers.
    const bool thousandths = raw >= 1000 || raw <= -1000;
    const double celsius = static_cast<double>(raw) / (thousandths ? 1000.0 : 1.0);
    // A sensor that is switched off tells the absolute zero or the largest number it has.
    if (celsius < -100.0 || celsius > 250.0) continue;
    const std::string name = plain(text_of(folder + "/" + entry + "/type"));
    zones.push_back({name.empty() ? entry : name, celsius});
  }
  return zones;
}

std::vector<Battery> read_batteries(const std::string& root) {
  const std::string folder = root + "/sys/class/power_supply";
  std::vector<Battery> found;
  for (const std::string& entry : entries(folder, "")) {
    const std::string supply = folder + "/" + entry;
    long long percent = 0;
    if (plain(text_of(supply + "/type")) != "Battery") continue;
    // That of a mouse or a headset.
    if (plain(text_of(supply + "/scope")) == "Device") continue;
    if (!read_number(supply + "/capacity", &percent) || percent < 0 || percent > 100) continue;
    found.push_back({static_cast<double>(percent), plain(text_of(supply + "/status"))});
  }
  return found;
}

std::vector<double> read_load(const std::string& root) {
  std::istringstream stream(text_of(root + "/proc/loadavg"));
  std::vector<double> load;
  for (std::string word; load.size() < 3 && stream >> word;) {
    char* end = nullptr;
    const double value = std::strtod(word.c_str(), &end);
    if (*end != '\0' || !(value >= 0 && value < 1e9)) return {};
    load.push_back(value);
  }
  return load;
}

std::string listed(const Cpus& cpus) {
  std::string text;
  for (unsigned cpu : cpus) text += (text.empty() ? "" : ",") + std::to_string(cpu);
  return text;
}

bool parse_cpu(const std::string& text, unsigned* cpu) {
  if (text.empty() || text.size() > 4 || text.find_first_not_of("0123456789") != text.npos) {
    return false;
  }
  *cpu = static_cast<unsigned>(std::strtoul(text.c_str(), nullptr, 10));
  return *cpu < max_cpus;
}

}  // namespace

std::string plain(const std::string& text) {
  std::string kept;
  for (char c : text) {
    if (c >= ' ' && c <= '~') kept += c;
  }
  return stripped(kept).substr(0, longest_name);
}

Processor processor(const std::string& root, const std::string& machine) {
  const std::string cpuinfo = text_of(root + "/proc/cpuinfo");
  // First: 32-bit Arm has a `model name` too, the same one on every board.
  std::vector<std::string> names = {text_of(root + "/proc/device-tree/model")};
  for (const char* field : {"Hardware", "model name"}) {
    for (const std::string& value : values(cpuinfo, field)) names.push_back(value);
  }
  names.push_back(arm_cores(cpuinfo, machine));
  names.push_back(machine);
  Processor found;
  for (const std::string& name : names) {
    if (found.name.empty()) found.name = plain(name);
  }
  std::vector<std::string> flags = words(values(cpuinfo, "flags"));
  for (const std::string& flag : words(values(cpuinfo, "Features"))) flags.push_back(flag);
  for (const char* feature : known_features) {
    if (std::find(flags.begin(), flags.end(), feature) != flags.end()) {
      found.features.emplace_back(feature);
    }
  }
  return found;
}

System system_of_this_device() {
  utsname told{};
  ::uname(&told);
  const std::string release = told.release;
  return {plain(told.machine),
          plain(std::string(told.sysname) + " " + release.substr(0, release.find('-')))};
}

Cpus allowed_cpus() {
  cpu_set_t sets[max_cpus / CPU_SETSIZE];
  if (::sched_getaffinity(0, sizeof sets, sets) != 0) {
    throw Error(EDGEQDM_UNSUPPORTED, "the system does not tell which CPUs there are");
  }
  Cpus cpus;
  for (unsigned cpu = 0; cpu < max_cpus; ++cpu) {
    if (CPU_ISSET_S(cpu, sizeof sets, sets)) cpus.push_back(cpu);
  }
  return cpus;
}

Cpus parse_cpus(const std::string& text) {
  std::set<unsigned> found;
  for (std::size_t start = 0; start <= text.size();) {
    const std::size_t comma = std::min(text.find(',', start), text.size());
    const std::string part = text.substr(start, comma - start);
    const std::size_t dash = std::min(part.find('-'), part.size());
    unsigned first = 0, last = 0;
    const bool good = parse_cpu(part.substr(0, dash), &first) &&
                      parse_cpu(dash == part.size() ? part : part.substr(dash + 1), &last);
    if (!good || first > last) {
      throw Error(usage_error, "argument --cpus: expected a list such as 0,4-7, found '" +
                                   plain(text).substr(0, 40) + "'");
    }
    for (unsigned cpu = first; cpu <= last; ++cpu) found.insert(cpu);
    start = comma + 1;
  }
  return Cpus(found.begin(), found.end());
}

Cpus fastest_cpus(const std::string& root, const Cpus& allowed, unsigned threads) {
  std::vector<std::pair<std::uint64_t, unsigned>> by_speed;
  for (unsigned cpu : allowed) by_speed.emplace_back(khz_of(root, cpu, "cpuinfo_max_freq"), cpu);
  std::sort(by_speed.begin(), by_speed.end(), std::greater<>());
  Cpus chosen;
  for (const auto& [khz, cpu] : by_speed) {
    const std::uint64_t slowest = chosen.empty() ? khz : by_speed[chosen.size() - 1].first;
    if (chosen.size() >= threads && khz < slowest) break;
    chosen.push_back(cpu);
  }
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

void pin(const Cpus& cpus, const Cpus& allowed, unsigned threads) {
  for (unsigned cpu : cpus) {
    if (std::find(allowed.begin(), allowed.end(), cpu) == allowed.end()) {
      throw Error(EDGEQDM_INPUT, "CPU " + std::to_string(cpu) + " is not one of those that this "
                                     "process may use: " + listed(allowed) +
                                     "; give --cpus others");
    }
  }
  if (cpus.size() < threads) {
    throw Error(EDGEQDM_INPUT, std::to_string(threads) + " threads on CPUs " + listed(cpus) +
                                   "; give --cpus at least as many");
  }
  cpu_set_t sets[max_cpus / CPU_SETSIZE];
  CPU_ZERO_S(sizeof sets, sets);
  for (unsigned cpu : cpus) CPU_SET_S(cpu, sizeof sets, sets);
  if (::sched_setaffinity(0, sizeof sets, sets) != 0) {
    throw Error(EDGEQDM_INPUT, "the system refuses CPUs " + listed(cpus) + "; give --cpus others");
  }
}

std::vector<std::uint64_t> highest_khz(const std::string& root, const Cpus& cpus) {
  std::set<std::uint64_t, std::greater<>> found;
  for (unsigned cpu : cpus) found.insert(khz_of(root, cpu, "cpuinfo_max_freq"));
  found.erase(0);
  return {found.begin(), found.end()};
}

std::vector<std::string> governors(const std::string& root, const Cpus& cpus) {
  std::set<std::string> found;
  for (unsigned cpu : cpus) {
    found.insert(plain(text_of(frequency_file(root, cpu, "scaling_governor"))));
  }
  found.erase("");
  return {found.begin(), found.end()};
}

Reading read_device(const std::string& root, const Cpus& cpus) {
  Reading reading;
  reading.zones = read_zones(root);
  for (unsigned cpu : cpus) {
    const std::uint64_t khz = khz_of(root, cpu, "scaling_cur_freq");
    if (khz != 0) reading.frequencies.push_back({cpu, khz});
  }
  reading.governors = governors(root, cpus);
  reading.load = read_load(root);
  reading.batteries = read_batteries(root);
  return reading;
}

std::string reading_text(const Reading& reading, double reference_us, const std::string& at) {
  std::string zones, frequencies, batteries;
  const auto add = [](std::string& list, const std::string& entry) {
    list += (list.empty() ? "" : ",") + entry;
  };
  for (const Zone& zone : reading.zones) {
    add(zones, "{\"name\":" + quoted(zone.name) + ",\"celsius\":" + number_text(zone.celsius) +
                   "}");
  }
  for (const Frequency& each : reading.frequencies) {
    add(frequencies, "{\"cpu\":" + std::to_string(each.cpu) + ",\"khz\":" +
                         std::to_string(each.khz) + "}");
  }
  for (const Battery& battery : reading.batteries) {
    add(batteries, "{\"percent\":" + number_text(battery.percent) + ",\"status\":" +
                       quoted(battery.status) + "}");
  }
  return "{\"at\":" + quoted(at) + ",\"reference_us\":" + number_text(reference_us) +
         ",\"load\":" + numbers_text(reading.load) + ",\"zones\":[" + zones +
         "],\"frequencies\":[" + frequencies + "],\"governors\":" +
         quoted_list(reading.governors) + ",\"batteries\":[" + batteries + "]}";
}

std::vector<std::string> warnings(const Reading& reading) {
  std::vector<std::string> found;
  for (const Zone& zone : reading.zones) {
    if (zone.celsius >= hot_celsius) {
      found.push_back("zone " + zone.name + " is hot: let the device cool down and measure again");
    }
  }
  for (const std::string& governor : reading.governors) {
    if (governor != "performance") {
      found.push_back("governor " + governor + " changes the frequency: set `performance`, or say "
                      "so with --power-mode");
    }
  }
  if (has_low_battery(reading)) found.emplace_back("the battery is low: plug the device in");
  return found;
}

bool has_low_battery(const Reading& reading) {
  return std::any_of(reading.batteries.begin(), reading.batteries.end(), [](const Battery& each) {
    return each.percent < low_battery_percent && each.status == "Discharging";
  });
}

std::string time_text() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  ::gmtime_r(&now, &parts);
  char text[40];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &parts);
  return text;
}

}  // namespace edgeqdm::bench
