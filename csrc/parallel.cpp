#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace anabranch {
namespace {

using Body = void (*)(void*, int, int);

struct Job {
  Body body;
  void* context;
  int tasks;
  std::atomic<int> next_task{0};
  std::atomic<int> next_thread{0};
};

void work(void* pointer) {
  Job& job = *static_cast<Job*>(pointer);
  const int thread = job.next_thread.fetch_add(1);
  for (int task = job.next_task.fetch_add(1); task < job.tasks; task = job.next_task.fetch_add(1))
    job.body(job.context, task, thread);
}

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel find_openmp() { return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel")); }

}  // namespace

void parallel_for(int tasks, int threads, Body body, void* context) {
  Job job;
  job.body = body;
  job.context = context;
  job.tasks = tasks;
  threads = std::min(threads, tasks);
  static const GompParallel openmp = find_openmp();
  if (threads <= 1) {
    work(&job);
  } else if (openmp != nullptr) {
    openmp(work, &job, static_cast<unsigned>(threads), 0);
  } else {
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(work, &job);
    work(&job);
    for (std::thread& other : others) other.join();
  }
}

}  // namespace anabranch
