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

// Call work(member, team) once for each member 0 … team − 1, on up to `threads` threads. The runtime may give fewer
// threads than were asked for, so only `team` says into how many parts the work falls.
template <class Work>
void run_parallel(int64_t elements, int64_t threads, const Work& work) {
  // Below this many elements a thread's start costs more than its work.
  constexpr int64_t kElementsPerThread = 1 << 14;
  const int64_t wanted = std::min(threads, elements / kElementsPerThread);
  if (wanted <= 1) {
    work(int64_t{0}, int64_t{1});
    return;
  }
#ifdef _OPENMP
#pragma omp parallel num_threads(static_cast<int>(wanted))
  work(int64_t{omp_get_thread_num()}, int64_t{omp_get_num_threads()});
#else
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(wanted));
  for (int64_t member = 1; member < wanted; ++member) {
    try {
      others.emplace_back([&work, member, wanted] { work(member, wanted); });
    } catch (const std::system_error&) {
      work(member, wanted);  // no more threads are to be had
    }
  }
  work(int64_t{0}, wanted);
  for (std::thread& other : others) other.join();
#endif
}

}  // namespace lisa
