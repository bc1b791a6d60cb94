// What this device is and how it fares, out of /proc and /sys. `root` is "" but in tests.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace edgeqdm::bench {

using Cpus = std::vector<unsigned>;  // ascending

// Name of the board or processor, and what decides over its kernels: as protocol.py has them.
struct Processor {
  std::string name;
  std::vector<std::string> features;
};
Processor processor(const std::string& root, const std::string& machine);

struct System {
  std::string machine;  // architecture
  std::string name;     // kernel and its release
};
System system_of_this_device();

// Printable ASCII of a text, at most 200 characters: what a profile can hold.
std::string plain(const std::string& text);

// CPUs that this process may use. Throws Error, UNSUPPORTED, where the system does not tell.
Cpus allowed_cpus();
// CPUs of a list as 0,4-7. Throws Error, with the exit code of wrong usage.
Cpus parse_cpus(const std::string& text);
// The CPUs among `allowed` with the highest frequencies: groups of equal ones, until there are as
// many as threads. All of them where the frequencies are not known.
Cpus fastest_cpus(const std::string& root, const Cpus& allowed, unsigned threads);
// Binds this process, and threads it makes later, to CPUs. Throws Error, INPUT, for CPUs that are
// not allowed or fewer than threads.
void pin(const Cpus& cpus, const Cpus& allowed, unsigned threads);

// Each once, those of the fastest first; empty where the system does not tell.
std::vector<std::uint64_t> highest_khz(const std::string& root, const Cpus& cpus);
// Each once.
std::vector<std::string> governors(const std::string& root, const Cpus& cpus);

struct Zone {
  std::string name;
  double celsius;
};
struct Frequency {
  unsigned cpu;
  std::uint64_t khz;
};
struct Battery {
  double percent;
  std::string status;  // as Linux calls it, e.g. Discharging
};
// How the device fares at a moment.
struct Reading {
  std::vector<Zone> zones;
  std::vector<Frequency> frequencies;
  std::vector<std::string> governors;
  std::vector<double> load;  // of 1, 5 and 15 minutes
  std::vector<Battery> batteries;
};
Reading read_device(const std::string& root, const Cpus& cpus);

// One line of JSON.
std::string reading_text(const Reading& reading, double reference_us, const std::string& at);

// What a user should know of a reading, one line each.
std::vector<std::string> warnings(const Reading& reading);
// Whether a battery is being emptied and is nearly empty.
bool has_low_battery(const Reading& reading);

// UTC, as 2026-11-01T12:00:00Z.
std::string time_text();

}  // namespace edgeqdm::bench
