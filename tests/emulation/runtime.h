// The CUDA runtime on the host, as far as csrc/cuda/launch.cuh calls it; a launch returns when the last thread has ended.
//
// The GPU is a Hopper, or what the environment says:
//   SAIT_EMULATE_CAPABILITY=80      one without clusters
//   SAIT_EMULATE_PTX=80             one whose driver makes the kernels' code from PTX for this capability
//   SAIT_EMULATE_SHARED_BYTES=...   one with less shared memory for a block
//   SAIT_EMULATE_ACTIVE_CLUSTERS=0  one that has no place for a cluster
//   SAIT_EMULATE_DRIVER=12080       one whose driver serves CUDA up to 12.8
//   SAIT_EMULATE_LOG=file           every launch leaves its blocks, threads, shared bytes and cluster there, in a line
// It may change between two launches: what was known of one GPU does not hold for another, which has a number of its own.
#pragma once

#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <tuple>
#include <utility>

#include "machine.h"

enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
struct cudaFuncAttributes {
  size_t sharedSizeBytes;  // without what is dynamic
  int maxDynamicSharedSizeBytes, ptxVersion, binaryVersion;
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace sait::emulation {

constexpr int kDevices = 2;  // of each kind

inline thread_local cudaError_t last_error = cudaSuccess;
inline thread_local int current_device = 0;

inline int most_shared_bytes() { return std::min<int>(kMostSharedBytes, asked("SHARED_BYTES", kMostSharedBytes)); }
inline int active_clusters() { return asked("ACTIVE_CLUSTERS", 1); }

struct Limits {
  int shared_bytes = 48 << 10;
  bool unportable_clusters = false;
};

// What is set of each kernel on each device, and how often each function was called.
class Driver {
 public:
  void count(const char* call) {
    const std::lock_guard<std::mutex> one_at_a_time(mutex_);
    ++calls_[call];
  }
  std::map<std::string, int> calls() {
    const std::lock_guard<std::mutex> one_at_a_time(mutex_);
    return calls_;
  }
  // The number of the current device: those of the environment's GPU follow those of the GPUs that were there before.
  int device() {
    const std::lock_guard<std::mutex> one_at_a_time(mutex_);
    const auto gpu = std::tuple(capability(), compiled_for(), most_shared_bytes(), active_clusters());
    return kDevices * gpus_.emplace(gpu, static_cast<int>(gpus_.size())).first->second + current_device;
  }
  template <typename Change>
  Limits limits(const void* kernel, Change change) {
    const int on = device();
    const std::lock_guard<std::mutex> one_at_a_time(mutex_);
    Limits& found = limits_[{kernel, on}];
    change(found);
    return found;
  }

 private:
  std::mutex mutex_;
  std::map<std::tuple<int, int, int, int>, int> gpus_;
  std::map<std::string, int> calls_;
  std::map<std::pair<const void*, int>, Limits> limits_;
};
inline Driver driver;

inline cudaError_t failed(cudaError_t error) { return last_error = error; }

inline int cluster_of(const cudaLaunchConfig_t& config) {
  return config.numAttrs == 0 ? 1 : static_cast<int>(config.attrs[0].val.clusterDim.x);
}

// What is wrong with a launch. Clusters of up to 8 blocks are there from sm_90 on; some of those GPUs have larger ones.
inline cudaError_t fault_of(const void* kernel, const cudaLaunchConfig_t& config) {
  const dim3 grid = config.gridDim;
  const unsigned threads = config.blockDim.x;
  const int cluster = cluster_of(config), gpu = capability();
  const Limits limits = driver.limits(kernel, [](Limits&) {});
  if (grid.x < 1 || grid.x > 0x7fffffff || grid.y < 1 || grid.y > 65535) return cudaErrorInvalidConfiguration;
  if (threads < 1 || threads > 1024) return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes > static_cast<size_t>(limits.shared_bytes)) return cudaErrorInvalidValue;
  const int most = gpu < 90 ? 1 : limits.unportable_clusters && (gpu == 90 || gpu == 100) ? 16 : 8;
  if (cluster < 1 || cluster > most || grid.x % static_cast<unsigned>(cluster) != 0) return cudaErrorInvalidClusterSize;
  return cudaSuccess;
}

inline void log_launch(const cudaLaunchConfig_t& config) {
  const char* name = std::getenv("SAIT_EMULATE_LOG");
  std::FILE* file = name == nullptr ? nullptr : std::fopen(name, "a");
  if (file == nullptr) return;
  std::fprintf(file, "%u %u %u %zu %d\n", config.gridDim.x, config.gridDim.y, config.blockDim.x,
               config.dynamicSmemBytes, cluster_of(config));
  std::fclose(file);
}

}  // namespace sait::emulation

inline cudaError_t cudaPeekAtLastError() { return sait::emulation::last_error; }
inline cudaError_t cudaGetLastError() { return std::exchange(sait::emulation::last_error, cudaSuccess); }

inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= sait::emulation::kDevices) return sait::emulation::failed(cudaErrorInvalidDevice);
  sait::emulation::current_device = device;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = sait::emulation::driver.device();
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = sait::emulation::asked("DRIVER", 13000);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  using namespace sait::emulation;
  driver.count("cudaDeviceGetAttribute");
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = capability() / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = capability() % 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = most_shared_bytes(); break;
  }
  return cudaSuccess;
}

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  using namespace sait::emulation;
  driver.count("cudaFuncGetAttributes");
  if (compiled_for() > capability()) return failed(cudaErrorNoKernelImageForDevice);
  *attributes = {0, driver.limits(kernel, [](Limits&) {}).shared_bytes, compiled_for(), capability()};
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  using namespace sait::emulation;
  driver.count("cudaFuncSetAttribute");
  const bool shared = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (value < 0 || (shared && value > most_shared_bytes())) return failed(cudaErrorInvalidValue);
  driver.limits(kernel, [&](Limits& limits) {
    if (shared) limits.shared_bytes = value;
    else limits.unportable_clusters = value != 0;
  });
  return cudaSuccess;
}
inline cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void* kernel, const cudaLaunchConfig_t* config) {
  using namespace sait::emulation;
  driver.count("cudaOccupancyMaxActiveClusters");
  const cudaError_t fault = fault_of(kernel, *config);
  if (fault != cudaSuccess) return failed(fault);
  *count = active_clusters();
  return cudaSuccess;
}

template <typename Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params), const Params& params) {
  using namespace sait::emulation;
  std::this_thread::yield();  // another one may come between this call and the one before it
  const cudaError_t fault = fault_of(reinterpret_cast<const void*>(kernel), *config);
  if (fault != cudaSuccess) return failed(fault);
  log_launch(*config);
  machine.run(config->gridDim, static_cast<int>(config->blockDim.x), static_cast<int>(config->dynamicSmemBytes),
              cluster_of(*config), [&] { kernel(params); });
  return cudaSuccess;
}
