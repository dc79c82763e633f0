// The threads of the native code.
//
// Where PyTorch's OpenMP runtime is loaded, its workers do the work: they are awake (by default they spin for some
// milliseconds after each of PyTorch's own regions), and threads of ours beside them would have to share the cores
// with that spinning: two OpenMP programs on few cores slow each other many times over. Elsewhere, and in a forked child
// (data-loader workers), where the runtime's workers do not exist but it does not know, a pool of our own does it, which
// sleeps on a condition variable while idle.
#pragma once

#include <cstdint>
#include <functional>

namespace dino_fast {

// Calls body(task) for task in [0, tasks), on at most `threads` threads, the caller's among them. Which thread runs a
// task is not determined; a task's results must depend on its number alone. A call from within a task runs on that
// task's thread. An exception that leaves body reaches the caller once all threads have stopped; tasks not yet begun are
// then left out, and of several exceptions one is passed on.
void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& body);

}  // namespace dino_fast
