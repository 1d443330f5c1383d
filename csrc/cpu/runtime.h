// What a CPU kernel needs from the host: the instruction set in force, and threads, which are torch's: ops/torch.cpp has
// them. Nothing in this folder knows torch.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SAIT_X86 1  // the vector instruction sets of foreach_isa.h can be compiled
#endif

namespace sait::cpu {

// Ordered: a later one includes the earlier ones.
enum class Isa : int { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

Isa best_isa();  // what this machine can run
Isa isa();  // what is in force: best_isa() unless lowered
void set_isa(Isa isa);  // lowers it (tests); raising it above best_isa() throws
const char* isa_name(Isa isa);
Isa isa_from_name(const char* name);

// While one is there, its thread computes alone: parallel_for runs here, and num_threads() is 1.
class Alone {
 public:
  Alone() { is_ = true; }
  ~Alone() { is_ = was_; }
  static bool is() { return is_; }

 private:
  const bool was_ = is_;
  static thread_local bool is_;
};

int num_threads();
using RangeFn = void (*)(int64_t begin, int64_t end, void* context);
void parallel_ranges(int64_t size, int64_t grain, void* context, RangeFn fn);

// body(begin, end) over [0, size) on torch's intra-op threads.
template <typename Body>
void parallel_for(int64_t size, int64_t grain, Body&& body) {
  parallel_ranges(size, grain, &body,
                  [](int64_t begin, int64_t end, void* context) { (*static_cast<Body*>(context))(begin, end); });
}

// task(i) for each i of [0, tasks): a thread takes the next one as soon as it is free, and computes it alone, so that one
// that is held up elsewhere takes fewer.
template <typename Task>
void parallel_tasks(int64_t tasks, Task&& task) {
  std::atomic<int64_t> next{0};
  parallel_for(std::min<int64_t>(tasks, num_threads()), 1, [&](int64_t begin, int64_t end) {
    const Alone alone;
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t i = next++; i < tasks; i = next++) task(i);
    }
  });
}

}  // namespace sait::cpu
