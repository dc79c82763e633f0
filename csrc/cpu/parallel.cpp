#include "cpu/parallel.h"

#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

namespace dino_fast {
namespace {

thread_local bool inside = false;  // a task: a call from there runs on this thread alone

class Inside {
 public:
  Inside() { inside = true; }
  ~Inside() { inside = before_; }
  Inside(const Inside&) = delete;
  Inside& operator=(const Inside&) = delete;

 private:
  const bool before_ = inside;
};

// The tasks of one call, which several threads take, and the first exception that left one of them.
class Job {
 public:
  Job(int64_t tasks, const std::function<void(int64_t)>& body) : tasks_(tasks), body_(body) {}

  // No exception may cross the frames of OpenMP or the start of a thread. After one, no further task is begun.
  void take_tasks() noexcept {
    const Inside task;
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) {
      try {
        body_(i);
      } catch (...) {
        next_.store(tasks_, std::memory_order_relaxed);
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!exception_) exception_ = std::current_exception();
      }
    }
  }

  // For the caller, once all threads have left take_tasks().
  void rethrow() const {
    if (exception_) std::rethrow_exception(exception_);
  }

 private:
  const int64_t tasks_;
  const std::function<void(int64_t)>& body_;
  std::atomic<int64_t> next_{0};
  std::mutex mutex_;
  std::exception_ptr exception_;
};

class Pool {
 public:
  void run(Job& job, int threads) {
    const std::lock_guard<std::mutex> one_job_at_a_time(job_mutex_);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      start_workers(threads - 1);
      job_ = &job;
      helpers_ = std::min(threads - 1, workers_);
      running_ = helpers_;
      ++generation_;
    }
    wake_.notify_all();
    job.take_tasks();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void start_workers(int wanted) {
    try {
      for (; workers_ < wanted; ++workers_) std::thread([this, index = workers_] { work(index); }).detach();
    } catch (const std::exception&) {  // no more threads or memory for one: fewer do the work
    }
  }

  void work(int index) {
    uint64_t seen = 0;
    for (;;) {
      Job* job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        if (index >= helpers_) continue;  // this job asked for fewer threads
        job = job_;
      }
      job->take_tasks();
      const std::lock_guard<std::mutex> lock(mutex_);
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex job_mutex_, mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int workers_ = 0, helpers_ = 0, running_ = 0;
  uint64_t generation_ = 0;
};

// Never destroyed: detached workers may outlive main's statics.
Pool* pool = nullptr;
const pid_t loaded_in = getpid();  // in a forked child it differs: OpenMP's workers do not exist there
std::once_flag registered;

Pool& the_pool() {
  std::call_once(registered, [] {
    pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] {
      pool = new Pool;
      inside = false;
    });
  });
  return *pool;
}

// PyTorch's OpenMP runtime, where the process has loaded one (GNU's, or one that speaks its interface).
using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
Parallel openmp() {
  static const Parallel found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

}  // namespace

void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& body) {
  if (tasks < threads) threads = static_cast<int>(tasks);
  if (threads <= 1 || inside) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  Pool& own = the_pool();
  Job job(tasks, body);
  if (openmp() != nullptr && getpid() == loaded_in) {
    openmp()([](void* shared) { static_cast<Job*>(shared)->take_tasks(); }, &job, static_cast<unsigned>(threads), 0);
  } else {
    own.run(job, threads);
  }
  job.rethrow();
}

}  // namespace dino_fast
