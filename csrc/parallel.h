// parallel_for: the only threading in the project.
#pragma once

namespace anabranch {

// Calls body(task, thread) for every task in [0, tasks), on up to `threads` threads; returns when all are done.
// Tasks are handed out in order, one at a time; `thread` < threads tells which scratch memory is free.
// Bodies must not throw.
//
// When the process already holds a GNU-compatible OpenMP runtime (torch brings one), its pool runs the tasks: a second
// pool would fight with the first for the cores, since idle OpenMP threads spin. Otherwise threads are started anew.
void parallel_for(int tasks, int threads, void (*body)(void* context, int task, int thread), void* context);

template <class Body>
void parallel_for(int tasks, int threads, Body&& body) {
  parallel_for(
      tasks, threads,
      [](void* context, int task, int thread) { (*static_cast<Body*>(context))(task, thread); }, &body);
}

}  // namespace anabranch
