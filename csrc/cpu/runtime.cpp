#include "cpu/runtime.h"

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

namespace sait::cpu {

Isa best_isa() {
#ifdef SAIT_X86
  static const Isa best = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::kAvx512Bf16;
    if (avx512) return Isa::kAvx512;
    return avx2 ? Isa::kAvx2 : Isa::kPortable;
  }();
  return best;
#else
  return Isa::kPortable;
#endif
}

thread_local bool Alone::is_ = false;

static std::atomic<int> forced_isa{-1};

Isa isa() {
  const int forced = forced_isa.load(std::memory_order_relaxed);
  return forced < 0 ? best_isa() : static_cast<Isa>(forced);
}

static constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};

const char* isa_name(Isa isa) { return kIsaNames[static_cast<int>(isa)]; }

Isa isa_from_name(const char* name) {
  for (int i = 0; i < 4; ++i) {
    if (std::strcmp(name, kIsaNames[i]) == 0) return static_cast<Isa>(i);
  }
  throw std::invalid_argument("set_isa: expected 'portable', 'avx2', 'avx512' or 'avx512_bf16', got '" +
                              std::string(name) + "'");
}

void set_isa(Isa isa) {
  if (isa > best_isa()) {
    throw std::invalid_argument(std::string("set_isa: this machine has no ") + isa_name(isa) + "; its best is " +
                                isa_name(best_isa()));
  }
  forced_isa.store(static_cast<int>(isa), std::memory_order_relaxed);
}

}  // namespace sait::cpu
