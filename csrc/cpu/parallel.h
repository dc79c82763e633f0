// A thread pool that sleeps when idle.
//
// OpenMP's workers spin after each region; two such runtimes on few cores slow each other tens of times. These workers
// wait on a condition variable instead. The pool is rebuilt in a forked child (data-loader workers), where the parent's
// threads do not exist.
#pragma once

#include <cstdint>
#include <functional>

namespace dino_fast {

// Calls body(task) for task in [0, tasks), on at most `threads` threads, the caller's among them. Which thread runs a
// task is not determined; what a task writes must depend on its number alone. Exceptions must not leave body.
void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& body);

}  // namespace dino_fast
