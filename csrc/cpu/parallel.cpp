#include "cpu/parallel.h"

#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace dino_fast {
namespace {

class Pool {
 public:
  void run(int64_t tasks, int threads, const std::function<void(int64_t)>& body) {
    std::lock_guard<std::mutex> one_job_at_a_time(job_mutex_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_) < threads - 1) {
        std::thread([this, index = workers_] { work(index); }).detach();
        ++workers_;
      }
      body_ = &body;
      tasks_ = tasks;
      next_.store(0, std::memory_order_relaxed);
      helpers_ = threads - 1;
      running_ = helpers_;
      ++generation_;
    }
    wake_.notify_all();
    take_tasks();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void work(int index) {
    uint64_t seen = 0;
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        if (index >= helpers_) continue;  // this job asked for fewer threads
      }
      take_tasks();
      std::lock_guard<std::mutex> lock(mutex_);
      if (--running_ == 0) done_.notify_one();
    }
  }

  void take_tasks() {
    for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) (*body_)(task);
  }

  std::mutex job_mutex_, mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int64_t)>* body_ = nullptr;
  int64_t tasks_ = 0;
  std::atomic<int64_t> next_{0};
  int workers_ = 0, helpers_ = 0, running_ = 0;
  uint64_t generation_ = 0;
};

// Never destroyed: detached workers may outlive main's statics.
Pool* pool = nullptr;
const pid_t loaded_in = getpid();  // in a forked child it differs: OpenMP's workers do not exist there
std::once_flag registered;
thread_local bool inside = false;

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

struct Job {
  const std::function<void(int64_t)>* body;
  int64_t tasks;
  std::atomic<int64_t> next{0};
};

void take_tasks(void* job) {
  Job& all = *static_cast<Job*>(job);
  for (int64_t task; (task = all.next.fetch_add(1, std::memory_order_relaxed)) < all.tasks;) (*all.body)(task);
}

}  // namespace

void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& body) {
  if (tasks < threads) threads = static_cast<int>(tasks);
  if (threads <= 1 || inside) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  inside = true;
  Pool& own = the_pool();
  if (openmp() != nullptr && getpid() == loaded_in) {
    Job job{&body, tasks};
    openmp()(&take_tasks, &job, static_cast<unsigned>(threads), 0);
  } else {
    own.run(tasks, threads, body);
  }
  inside = false;
}

}  // namespace dino_fast
