// csrc/cpu/parallel.cpp on its own: exceptions, nested calls, and work afterwards. Exits with the number of the line that
// found a fault, 0 where there is none. Compiled twice by test_parallel.py: with OpenMP's workers and with the pool.
#include "cpu/parallel.h"

#include <atomic>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#define REQUIRE(condition) \
  if (!(condition)) std::_Exit(__LINE__)

namespace {

constexpr int64_t kTasks = 1000;

void every_task_runs_once(int threads) {
  std::vector<std::atomic<int>> runs(kTasks);
  dino_fast::parallel_for(kTasks, threads, [&](int64_t task) { ++runs[task]; });
  for (const auto& times : runs) REQUIRE(times == 1);
}

// `thrower` of -1: every task throws.
template <typename Exception> void exception_reaches_the_caller(int threads, int64_t thrower, const Exception& thrown) {
  std::atomic<int> alive{0};
  bool caught = false;
  struct Count {
    std::atomic<int>& n;
    explicit Count(std::atomic<int>& count) : n(count) { ++n; }
    ~Count() { --n; }
  };
  try {
    dino_fast::parallel_for(kTasks, threads, [&](int64_t task) {
      const Count count(alive);
      if (thrower < 0 || task == thrower) throw thrown;
    });
  } catch (const Exception& exception) {
    caught = std::string(exception.what()) == thrown.what();
  }
  REQUIRE(caught);
  REQUIRE(alive == 0);  // nobody is still in the body that the caller has left
}

void nested_calls_finish(int threads) {
  std::atomic<int64_t> runs{0};
  dino_fast::parallel_for(8, threads, [&](int64_t) {
    const std::thread::id own = std::this_thread::get_id();
    dino_fast::parallel_for(10, threads, [&](int64_t) {
      REQUIRE(std::this_thread::get_id() == own);
      ++runs;
    });
  });
  REQUIRE(runs == 80);
  bool caught = false;
  try {
    dino_fast::parallel_for(8, threads, [&](int64_t) {
      dino_fast::parallel_for(10, threads, [&](int64_t) { throw std::runtime_error("within"); });
    });
  } catch (const std::runtime_error&) {
    caught = true;
  }
  REQUIRE(caught);
}

}  // namespace

int main() {
  for (int threads : {1, 2, 4}) {
    for (int round = 0; round < 50; ++round) {
      for (int64_t thrower : {int64_t{-1}, int64_t{0}, kTasks / 2, kTasks - 1}) {
        exception_reaches_the_caller(threads, thrower, std::bad_alloc());
        exception_reaches_the_caller(threads, thrower, std::runtime_error("a message"));
        every_task_runs_once(threads);
      }
      nested_calls_finish(threads);
      every_task_runs_once(threads);
    }
  }
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([i] {
      for (int round = 0; round < 50; ++round) {
        exception_reaches_the_caller(3, i % 2 ? 7 : -1, std::runtime_error("of one caller of several"));
        every_task_runs_once(3);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  return 0;
}
