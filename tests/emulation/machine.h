// Runs the threads of CUDA blocks as fibers of the calling thread: one runs until it waits for others.
//
// The blocks of a cluster live together, the clusters one after the other. Which fiber goes on is chosen at every wait:
// ascending, descending, or at random; a kernel whose result depends on it lacks a barrier.
#pragma once

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <source_location>
#include <string>
#include <vector>

#include "language.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#define SAIT_START_SWITCH(save, to) __sanitizer_start_switch_fiber(save, (to).stack, (to).stack_size)
#define SAIT_FINISH_SWITCH(saved, from) __sanitizer_finish_switch_fiber(saved, &(from).stack, &(from).stack_size)
#else
#define SAIT_START_SWITCH(save, to) static_cast<void>(0)
#define SAIT_FINISH_SWITCH(saved, from) static_cast<void>(0)
#endif

#ifndef __x86_64__
#error "the emulation switches stacks by x86-64 instructions"
#endif

namespace sait::emulation {

using Where = std::source_location;

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr size_t kStackBytes = 256 << 10, kGuardBytes = 4096;
constexpr int kMostBlocks = 16, kMostWarps = kMostBlocks * 32;  // of a cluster
constexpr size_t kMostSharedBytes = 227 << 10, kRedZone = 4096;

struct Copy {
  void* shared;
  const void* global;  // nullptr: zeros
};

struct Block {
  unsigned char* shared;  // aligned to 16 bytes and to no more, with red zones around
  uint3 index;
  int living;
  bool started;
  int at_barrier;  // threads that wait there
  Where barrier;
};

struct Fiber {
  void* stack_pointer;
  const void* stack;  // its lowest address
  size_t stack_size;
  void* sanitizer;  // what ASan keeps of a fiber that does not run
  Block* block;
  uint3 thread;
  int warp, lane;  // warps count through the cluster
  bool living;
  const char* waits_at;
  Where where;
  int cluster_arrivals;  // barriers of the cluster that the thread arrived at,
  int cluster_waits;  // and waited for
  std::vector<Copy> copies;  // that have not landed, oldest first
  std::vector<size_t> groups;  // sizes of the committed groups under way, oldest first
  size_t uncommitted;
};

struct Warp {
  uint32_t arrived, living;
  const char* name;  // of the collective that they arrived at
  Where where;
  int first;  // the lane that came first
  void* lanes[kLanes];
};

// The number that SAIT_EMULATE_<what> asks for.
inline int asked(const std::string& what, int otherwise) {
  const char* number = std::getenv(("SAIT_EMULATE_" + what).c_str());
  return number == nullptr ? otherwise : std::atoi(number);
}
// Of the GPU that is emulated, and of the one that the kernels were compiled for.
inline int capability() { return asked("CAPABILITY", 90); }
inline int compiled_for() { return asked("PTX", capability()); }

enum class Order { kAscending, kDescending, kRandom };

// Saves the registers that a call preserves, and goes on where `to` was saved.
__attribute__((naked, noinline)) inline void switch_stack([[maybe_unused]] void** save, [[maybe_unused]] void* to) {
  asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15;"
      "mov %rsp, (%rdi); mov %rsi, %rsp;"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}

class Machine {
 public:
  // All blocks of a grid. `body` is what a thread does.
  void run(dim3 grid, int threads, int shared_bytes, int cluster, const std::function<void()>& body) {
    const std::lock_guard<std::mutex> one_at_a_time(mutex_);
    choose_order();
    body_ = &body;
    ::gridDim = grid;
    ::blockDim = {static_cast<unsigned>(threads)};
    shared_bytes_ = shared_bytes;
    threads_ = threads;
    cluster_ = cluster;
    allocate();
    const int64_t clusters = static_cast<int64_t>(grid.x / cluster) * grid.y;
    const int64_t shift = order_ == Order::kRandom ? random() % clusters : 0;
    for (int64_t c = 0; c < clusters; ++c) {
      const int64_t at = order_ == Order::kDescending ? clusters - 1 - c : (c + shift) % clusters;
      const int64_t along = grid.x / cluster;
      run_cluster(static_cast<unsigned>(at % along * cluster), static_cast<unsigned>(at / along));
    }
  }

  Fiber& self() { return *running_; }
  int shared_bytes() const { return shared_bytes_; }
  int cluster() const { return cluster_; }

  // The block of the cluster that has this rank.
  Block& block(int rank) { return blocks_[rank]; }
  int rank() { return static_cast<int>(running_->block - blocks_); }

  // All lanes of a warp come here with the same name from the same line; the last one gets true, does the work with
  // what the others left in lanes(), and releases them.
  SAIT_UNCHECKED bool arrive(const char* name, Where where, void* mine) {
    Fiber& fiber = *running_;
    Warp& warp = warps_[fiber.warp];
    if (warp.living != kAllLanes) {
      fail(where, "%s: only %d lanes of the warp are alive", name, std::popcount(warp.living));
    }
    if (warp.arrived == 0) {
      warp.name = name;
      warp.where = where;
      warp.first = fiber.lane;
    } else if (name != warp.name || !same_line(where, warp.where)) {
      fail(where, "divergent warp: %s, but lane %d waits at %s (%s)", name, warp.first, warp.name,
           place(warp.where).c_str());
    }
    warp.lanes[fiber.lane] = mine;
    warp.arrived |= 1u << fiber.lane;
    fiber.waits_at = name;
    fiber.where = where;
    return warp.arrived == kAllLanes;
  }
  SAIT_UNCHECKED void* const* lanes() { return warps_[running_->warp].lanes; }
  SAIT_UNCHECKED void release_warp() {
    Warp& warp = warps_[running_->warp];
    warp.arrived = 0;
    make_ready(running_->warp, kAllLanes);
  }

  SAIT_UNCHECKED void sync_block(Where where) {
    Fiber& fiber = *running_;
    Block& block = *fiber.block;
    if (block.at_barrier > 0 && !same_line(where, block.barrier)) {
      fail(where, "divergent barrier: %d threads of the block wait at %s", block.at_barrier,
           place(block.barrier).c_str());
    }
    block.barrier = where;
    ++block.at_barrier;
    fiber.waits_at = "sync_block";
    fiber.where = where;
    complete_barrier(block);
    wait();
  }

  void cluster_arrive(Where where) {
    Fiber& fiber = *running_;
    if (fiber.cluster_arrivals != fiber.cluster_waits) fail(where, "cluster_arrive twice without cluster_wait");
    ++fiber.cluster_arrivals;
    ++cluster_arrived_;
    complete_cluster_barrier();
  }
  void cluster_wait(Where where) {
    Fiber& fiber = *running_;
    if (fiber.cluster_arrivals == fiber.cluster_waits) fail(where, "cluster_wait without cluster_arrive");
    ++fiber.cluster_waits;
    fiber.waits_at = "cluster_wait";
    fiber.where = where;
    if (cluster_barriers_ >= fiber.cluster_waits) make_ready(fiber.warp, 1u << fiber.lane);
    wait();
  }

  // Lets the thread wait until it is made ready; another one goes on.
  SAIT_UNCHECKED void wait() {
    Fiber* next = choose();
    if (next == nullptr) fail_deadlock();
    if (next != running_) switch_to(*next);
  }

  bool in_shared_memory(const void* address, size_t bytes) {
    const auto* p = static_cast<const unsigned char*>(address);
    const unsigned char* begin = running_->block->shared;
    return p >= begin && p + bytes <= begin + shared_bytes_;
  }
  // In the arena of any block, declared or not.
  bool is_shared(const void* address) {
    for (int rank = 0; rank < cluster_; ++rank) {
      const auto offset = static_cast<const unsigned char*>(address) - blocks_[rank].shared;
      if (offset >= 0 && offset < static_cast<ptrdiff_t>(kMostSharedBytes)) return true;
    }
    return false;
  }

  [[noreturn, gnu::format(printf, 3, 4)]] void fail(Where where, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::fprintf(stderr, "\nemulation: block (%u, %u), thread %u: ", running_->block->index.x, running_->block->index.y,
                 running_->thread.x);
    std::vfprintf(stderr, format, arguments);
    std::fprintf(stderr, " [%s, %s order]\n", place(where).c_str(), order_name());
    std::abort();
  }

 private:
  SAIT_UNCHECKED static bool same_line(Where a, Where b) {
    return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
  }
  static std::string place(Where where) { return std::string(where.file_name()) + ":" + std::to_string(where.line()); }

  const char* order_name() const {
    return order_ == Order::kAscending ? "ascending" : order_ == Order::kDescending ? "descending" : "random";
  }

  // SAIT_EMULATE_ORDER: ascending, descending, random or random:<seed>. By default one launch after the other takes
  // another of them.
  void choose_order() {
    const char* asked = std::getenv("SAIT_EMULATE_ORDER");
    const std::string order = asked == nullptr ? "" : asked;
    const uint64_t seed = order.starts_with("random:") ? std::strtoull(order.c_str() + 7, nullptr, 10) : launches_;
    random_ = 0x9e3779b97f4a7c15ull * (seed + 1);
    if (order.empty()) order_ = static_cast<Order>(launches_ % 3);
    else if (order == "ascending") order_ = Order::kAscending;
    else if (order == "descending") order_ = Order::kDescending;
    else if (order.starts_with("random")) order_ = Order::kRandom;
    else {
      std::fprintf(stderr, "emulation: SAIT_EMULATE_ORDER: no order %s\n", asked);
      std::abort();
    }
    ++launches_;
  }
  SAIT_UNCHECKED uint64_t random() {  // xorshift
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return random_ >> 16;
  }

  void allocate() {
    warps_per_block_ = (threads_ + kLanes - 1) / kLanes;
    const int warps = warps_per_block_ * cluster_;
    warps_in_use_ = warps;
    for (int i = 0; i < warps * kLanes; ++i) {
      if (fibers_[i] == nullptr) fibers_[i] = new_fiber();
    }
    for (int rank = 0; rank < cluster_; ++rank) {
      if (blocks_[rank].shared != nullptr) continue;
      constexpr size_t size = kRedZone + kMostSharedBytes + kRedZone;
      auto* arena = static_cast<unsigned char*>(map(size));
      ASAN_POISON_MEMORY_REGION(arena, size);
      blocks_[rank].shared = arena + kRedZone - 16;
    }
  }

  static void* map(size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      std::perror("emulation: mmap");
      std::abort();
    }
    return memory;
  }

  static Fiber* new_fiber() {
    auto* memory = static_cast<unsigned char*>(map(kGuardBytes + kStackBytes));
    mprotect(memory, kGuardBytes, PROT_NONE);
    auto* fiber = new Fiber();
    fiber->stack = memory + kGuardBytes;
    fiber->stack_size = kStackBytes;
    // switch_stack pops six registers and returns to fiber_main, which then finds the stack as after a call.
    auto** top = reinterpret_cast<void**>(memory + kGuardBytes + kStackBytes);
    top[-2] = reinterpret_cast<void*>(&fiber_main);
    fiber->stack_pointer = top - 8;
    return fiber;
  }

  static void fiber_main();

  void run_cluster(unsigned x, unsigned y) {
    for (int rank = 0; rank < cluster_; ++rank) {
      Block& block = blocks_[rank];
      block = {block.shared, {x + static_cast<unsigned>(rank), y, 0}, threads_, false, 0, {}};
      for (int w = 0; w < warps_per_block_; ++w) {
        const int index = rank * warps_per_block_ + w, lanes = std::min(kLanes, threads_ - w * kLanes);
        Warp& warp = warps_[index];
        warp.arrived = 0;
        warp.living = lanes == kLanes ? kAllLanes : (1u << lanes) - 1;
        for (int lane = 0; lane < lanes; ++lane) {
          Fiber& fiber = *fibers_[index * kLanes + lane];
          fiber.block = &block;
          fiber.thread = {static_cast<unsigned>(w * kLanes + lane), 0, 0};
          fiber.warp = index;
          fiber.lane = lane;
          fiber.living = true;
          fiber.cluster_arrivals = fiber.cluster_waits = 0;
          fiber.uncommitted = 0;
          fiber.copies.clear();
          fiber.groups.clear();
        }
        make_ready(index, warp.living);
      }
    }
    living_ = threads_ * cluster_;
    cluster_arrived_ = cluster_barriers_ = 0;
    running_ = &host_;
    switch_to(*choose());
  }

  SAIT_UNCHECKED void switch_to(Fiber& next) {
    Fiber& self = *running_;
    previous_ = &self;
    running_ = &next;
    SAIT_START_SWITCH(&self.sanitizer, next);
    switch_stack(&self.stack_pointer, next.stack_pointer);
    resume();
  }
  SAIT_UNCHECKED void resume() {
    SAIT_FINISH_SWITCH(running_->sanitizer, *previous_);
    if (running_ == &host_) return;
    ::threadIdx = running_->thread;
    ::blockIdx = running_->block->index;
  }

  // A block's memory is there from its first thread's start to its last thread's end, and begins as NaN.
  void start_thread() {
    Block& block = *running_->block;
    if (block.started) return;
    block.started = true;
    ASAN_UNPOISON_MEMORY_REGION(block.shared, shared_bytes_);
    std::memset(block.shared, 0xff, shared_bytes_);
  }

  void finish_thread() {
    Fiber& fiber = *running_;
    Block& block = *fiber.block;
    Warp& warp = warps_[fiber.warp];
    if (!fiber.copies.empty())
      fail(Where::current(), "%zu asynchronous copies at the thread's end", fiber.copies.size());
    if (warp.arrived != 0) {
      fail(warp.where, "divergent warp: the thread ends, but lane %d waits at %s", warp.first, warp.name);
    }
    fiber.living = false;
    warp.living &= ~(1u << fiber.lane);
    --living_;
    if (--block.living == 0) ASAN_POISON_MEMORY_REGION(block.shared, shared_bytes_);
    if (fiber.cluster_arrivals > cluster_barriers_) --cluster_arrived_;
    complete_barrier(block);
    complete_cluster_barrier();
    Fiber* next = living_ == 0 ? &host_ : choose();
    if (next == nullptr) fail_deadlock();
    switch_to(*next);
  }

  // Threads that have ended are not waited for.
  SAIT_UNCHECKED void complete_barrier(Block& block) {
    if (block.at_barrier == 0 || block.at_barrier < block.living) return;
    block.at_barrier = 0;
    const int first = static_cast<int>(&block - blocks_) * warps_per_block_;
    for (int w = first; w < first + warps_per_block_; ++w) make_ready(w, warps_[w].living);
  }
  void complete_cluster_barrier() {
    if (cluster_arrived_ == 0 || cluster_arrived_ < living_) return;
    cluster_arrived_ = 0;
    ++cluster_barriers_;
    for (int i = 0; i < warps_in_use_ * kLanes; ++i) {
      const Fiber* fiber = fibers_[i];
      if (fiber->living && fiber->cluster_waits == cluster_barriers_) make_ready(fiber->warp, 1u << fiber->lane);
    }
  }

  // ready_ has a bit for each thread that may go on, busy_ one for each warp with such threads. Descending, both are
  // numbered from the end, so that the lowest one is always the one to take.
  SAIT_UNCHECKED int place_of(int warp) const { return order_ == Order::kDescending ? warps_in_use_ - 1 - warp : warp; }
  SAIT_UNCHECKED static uint32_t reversed(uint32_t lanes) {
    lanes = (lanes >> 1 & 0x55555555) | (lanes & 0x55555555) << 1;
    lanes = (lanes >> 2 & 0x33333333) | (lanes & 0x33333333) << 2;
    lanes = (lanes >> 4 & 0x0f0f0f0f) | (lanes & 0x0f0f0f0f) << 4;
    return __builtin_bswap32(lanes);
  }
  SAIT_UNCHECKED void make_ready(int warp, uint32_t lanes) {
    if (lanes == 0) return;
    const int at = place_of(warp);
    ready_[at] |= order_ == Order::kDescending ? reversed(lanes) : lanes;
    busy_[at / 64] |= 1ull << at % 64;
  }
  // Takes a thread that may go on; nullptr where all wait.
  SAIT_UNCHECKED Fiber* choose() {
    int warp = -1;
    if (order_ == Order::kRandom) warp = busy_from(static_cast<int>(random() % warps_in_use_));
    if (warp < 0) warp = busy_from(0);
    if (warp < 0) return nullptr;
    uint32_t& lanes = ready_[warp];
    int lane = __builtin_ctz(lanes);
    if (order_ == Order::kRandom) {
      const uint32_t behind = lanes & (kAllLanes << random() % kLanes);
      if (behind != 0) lane = __builtin_ctz(behind);
    }
    lanes &= ~(1u << lane);
    if (lanes == 0) busy_[warp / 64] &= ~(1ull << warp % 64);
    if (order_ == Order::kDescending) lane = kLanes - 1 - lane;
    return fibers_[place_of(warp) * kLanes + lane];
  }
  // The first warp from this one on that has a thread to go on, or -1.
  SAIT_UNCHECKED int busy_from(int warp) const {
    uint64_t mask = ~0ull << warp % 64;
    for (int i = warp / 64; i <= (warps_in_use_ - 1) / 64; ++i, mask = ~0ull) {
      if (busy_[i] & mask) return i * 64 + __builtin_ctzll(busy_[i] & mask);
    }
    return -1;
  }

  [[noreturn]] void fail_deadlock() {
    std::fprintf(stderr, "\nemulation: deadlock: no thread can go on [%s order]\n", order_name());
    int shown = 0;
    for (int i = 0; i < warps_in_use_ * kLanes; ++i) {
      const Fiber* fiber = fibers_[i];
      if (!fiber->living || shown++ >= 40) continue;
      std::fprintf(stderr, "  block (%u, %u), thread %u: at %s, %s\n", fiber->block->index.x, fiber->block->index.y,
                   fiber->thread.x, fiber->waits_at, place(fiber->where).c_str());
    }
    std::abort();
  }

  std::mutex mutex_;
  uint64_t launches_ = 0, random_ = 0;
  Order order_ = Order::kAscending;
  const std::function<void()>* body_ = nullptr;
  int threads_ = 0, shared_bytes_ = 0, cluster_ = 1, warps_per_block_ = 0;
  int living_ = 0, cluster_arrived_ = 0, cluster_barriers_ = 0;
  Fiber host_{};
  Fiber* running_ = &host_;
  Fiber* previous_ = nullptr;
  int warps_in_use_ = 0;
  Fiber* fibers_[kMostWarps * kLanes] = {};  // made when first needed and kept, as is the memory of the blocks
  Block blocks_[kMostBlocks] = {};
  Warp warps_[kMostWarps] = {};
  uint32_t ready_[kMostWarps] = {};
  uint64_t busy_[kMostWarps / 64] = {};
};

inline Machine machine;

inline void Machine::fiber_main() {
  machine.resume();
  for (;;) {
    machine.start_thread();
    (*machine.body_)();
    machine.finish_thread();
  }
}

}  // namespace sait::emulation
