// Clocks, and the end that Ctrl-C asks for.
#pragma once

#include <ctime>

namespace edgeqdm::bench {

enum class Clock {
  thread_cpu,  // CPU time of the calling thread: other programs do not count
  wall,        // where several threads compute
};

inline double seconds_now(clockid_t id) noexcept {
  timespec time{};
  ::clock_gettime(id, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

class Stopwatch {
 public:
  explicit Stopwatch(Clock clock) noexcept
      : id_(clock == Clock::thread_cpu ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC) {}

  // Microseconds that `work` takes, to 0.01 and at least that. Throws Error, CANCELLED, after
  // Ctrl-C.
  template <typename Work>
  double timed(const Work& work) const {
    check_interrupt();
    const double started = seconds_now(id_);
    work();
    return rounded_us(seconds_now(id_) - started);
  }

  double now() const noexcept { return seconds_now(id_); }

 private:
  static double rounded_us(double seconds) noexcept;
  static void check_interrupt();

  clockid_t id_;
};

// Ctrl-C is told to the next `timed`; a second one ends the program at once. A full disk and a
// closed pipe are errors of the calls that meet them, not signals.
void set_signals() noexcept;

}  // namespace edgeqdm::bench
