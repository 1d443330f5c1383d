// The functions of csrc/cuda/launch.cuh on the host: a launch returns when the last thread has ended.
#pragma once

#include "instructions.h"

namespace sait::cuda {

struct Grid {
  int64_t x, y = 1;
  int threads;
  int shared_bytes = 0;
  int cluster = 1;
};

inline int capability() { return emulation::capability(); }
inline int most_shared_bytes() {
  constexpr int most = emulation::kMostSharedBytes;
  const char* asked = std::getenv("SAIT_EMULATE_SHARED_BYTES");
  return asked == nullptr ? most : std::min(most, std::atoi(asked));
}

template <typename Params>
int launch(void (*kernel)(Params), const Grid& grid, void*, const Params& params) {
  if (grid.x == 0 || grid.y == 0) return cudaSuccess;
  if (grid.x < 0 || grid.x > 0x7fffffff || grid.y < 0 || grid.y > 65535) return cudaErrorInvalidConfiguration;
  if (grid.threads < 1 || grid.threads > 1024) return cudaErrorInvalidConfiguration;
  if (grid.shared_bytes < 0 || grid.shared_bytes > most_shared_bytes()) return cudaErrorInvalidValue;
  if (grid.cluster < 1 || grid.cluster > (capability() >= 90 ? 16 : 1) || grid.x % grid.cluster != 0) {
    return cudaErrorInvalidClusterSize;
  }
  machine.run({static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y)}, grid.threads, grid.shared_bytes,
              grid.cluster, [&] { kernel(params); });
  return cudaSuccess;
}

}  // namespace sait::cuda
