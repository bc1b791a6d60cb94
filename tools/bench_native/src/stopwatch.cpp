#include "stopwatch.h"

#include <signal.h>

#include <algorithm>
#include <cmath>
#include <csignal>

#include "error.h"

namespace edgeqdm::bench {
namespace {

// The only thing that a signal handler may touch.
volatile std::sig_atomic_t interrupted = 0;

extern "C" void on_interrupt(int) { interrupted = 1; }

}  // namespace

double Stopwatch::rounded_us(double seconds) noexcept {
  return std::max(std::round(seconds * 1e8) / 100, 0.01);
}

void Stopwatch::check_interrupt() {
  if (interrupted != 0) throw Error(EDGEQDM_CANCELLED, "interrupted");
}

void set_signals() noexcept {
  struct sigaction action{};
  action.sa_handler = on_interrupt;
  action.sa_flags = static_cast<int>(SA_RESETHAND);
  ::sigaction(SIGINT, &action, nullptr);
  std::signal(SIGXFSZ, SIG_IGN);
  std::signal(SIGPIPE, SIG_IGN);
}

}  // namespace edgeqdm::bench
