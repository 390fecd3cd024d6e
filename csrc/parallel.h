// Runs work on several threads: OpenMP's, which torch has started anyway, or without OpenMP threads of our own.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#else
#include <system_error>
#include <thread>
#include <vector>
#endif

namespace lisa {

// Call work(team) on each of `team` threads, up to `threads` of them; the runtime may give fewer than were asked for.
template <class Work>
void run_parallel(int64_t elements, int64_t threads, const Work& work) {
  // Below this many elements a thread's start costs more than its work.
  constexpr int64_t kElementsPerThread = 1 << 14;
  const int64_t wanted = std::min(threads, elements / kElementsPerThread);
  if (wanted <= 1) {
    work(int64_t{1});
    return;
  }
#ifdef _OPENMP
#pragma omp parallel num_threads(static_cast<int>(wanted))
  work(int64_t{omp_get_num_threads()});
#else
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(wanted));
  for (int64_t other = 1; other < wanted; ++other) {
    try {
      others.emplace_back([&work, wanted] { work(wanted); });
    } catch (const std::system_error&) {
      break;  // no more threads are to be had, and those there are do all the work
    }
  }
  work(wanted);
  for (std::thread& other : others) other.join();
#endif
}

}  // namespace lisa
