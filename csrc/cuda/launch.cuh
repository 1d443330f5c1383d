// Launching a kernel, and what the driver is asked before. A device, a kernel on it, and a size of clusters of that are
// each asked about once: a launch that is not the first goes to cudaLaunchKernelEx after two look-ups. `make emulate`
// has this file as it stands, over a CUDA runtime of its own, tests/emulation/runtime.h.
//
// Errors: that of a launch is what cudaLaunchKernelEx returns, and nothing else. cudaGetLastError would also give what
// somebody before us has left there; it is called only behind a call of ours that failed, whose error it then takes
// away, so that the next to ask for the last error is not told of ours. Where ours succeed, what others left stays.
#pragma once

#include <limits>
#include <map>
#include <mutex>
#include <tuple>

#include "instructions.cuh"

#ifdef SAIT_EMULATE
#include "runtime.h"
#endif

namespace sait::cuda {

struct Grid {
  int64_t x, y = 1;  // blocks; y <= 65535
  int threads;  // of a block
  int shared_bytes = 0;
  int cluster = 1;  // blocks along x that share their memory; above 8 only where the device allows it
};

namespace driver {

// The error of a call, once it waits for nobody any more.
inline cudaError_t cleared(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// What ask(value) has left in `value`, for every later call with this key. Errors are not kept.
template <typename Key, typename Value>
class Answers {
 public:
  template <typename Ask>
  cudaError_t find(const Key& key, Value& value, Ask ask) {
    const std::lock_guard<std::mutex> one_asks(mutex_);
    const auto known = known_.find(key);
    if (known != known_.end()) {
      value = known->second;
      return cudaSuccess;
    }
    const cudaError_t error = cleared(ask(value));
    if (error == cudaSuccess) known_.emplace(key, value);
    return error;
  }

 private:
  std::mutex mutex_;
  std::map<Key, Value> known_;
};

struct Device {
  int number, capability;  // major compute capability times ten plus minor
  int most_shared_bytes;  // of a block
};

inline cudaError_t current_device(Device& device) {
  static Answers<int, Device> answers;
  int number = 0;
  const cudaError_t none = cleared(cudaGetDevice(&number));
  if (none != cudaSuccess) return none;
  return answers.find(number, device, [number](Device& found) {
    int major = 0, minor = 0;
    cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, number);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, number);
    found.number = number;
    found.capability = 10 * major + minor;
    if (error != cudaSuccess) return error;
    return cudaDeviceGetAttribute(&found.most_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, number);
  });
}

// Lets a kernel have all the shared memory that a block can get on a device, and clusters of more than 8 blocks where
// they are asked for. Set to what one launch needs, the limit might be another thread's by the time of that launch.
// `compiled_for` is the capability that its source saw, __CUDA_ARCH__ / 10: less than the device's where the driver has
// made its code from PTX.
inline cudaError_t make_ready(const void* kernel, int cluster, const Device& device, int& compiled_for) {
  static Answers<std::tuple<const void*, int, bool>, int> answers;
  const bool unportable = cluster > 8;
  return answers.find({kernel, device.number, unportable}, compiled_for, [&](int& ptx_version) {
    cudaFuncAttributes attributes{};
    cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
    ptx_version = attributes.ptxVersion;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 device.most_shared_bytes - static_cast<int>(attributes.sharedSizeBytes));
    if (error != cudaSuccess || !unportable) return error;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  });
}

// `cluster` is the memory of the launch's attribute.
inline cudaLaunchConfig_t config_of(const Grid& grid, void* stream, cudaLaunchAttribute& cluster) {
  cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  return config;
}

// How many clusters the current device can have at work; 0 where it is not known to run one.
inline int active_clusters(const void* kernel, const Grid& grid) {
  static Answers<std::tuple<const void*, int, int, int>, int> answers;
  Device device;
  int compiled_for = 0, active = 0;
  if (current_device(device) != cudaSuccess || device.capability < 90) return 0;
  if (make_ready(kernel, grid.cluster, device, compiled_for) != cudaSuccess || compiled_for < 90) return 0;
  answers.find({kernel, device.number, grid.cluster, grid.shared_bytes}, active, [&](int& count) {
    cudaLaunchAttribute cluster;
    Grid one = grid;
    one.x = grid.cluster, one.y = 1;
    const cudaLaunchConfig_t config = config_of(one, nullptr, cluster);
    // A size that the device does not have is an error, and as good an answer as 0.
    if (cleared(cudaOccupancyMaxActiveClusters(&count, kernel, &config)) != cudaSuccess) count = 0;
    return cudaSuccess;
  });
  return active;
}

}  // namespace driver

// Whether the current device runs `kernel` in the clusters of `grid`. It may have none of that size: they lie within one
// part of a GPU, which may be small or, under MIG, somebody else's. Or it may run what was compiled for a GPU without.
template <typename Params>
bool runs_clusters(void (*kernel)(Params), const Grid& grid) {
  return driver::active_clusters(reinterpret_cast<const void*>(kernel), grid) > 0;
}

// Runs kernel(params) on a stream (a cudaStream_t); returns a cudaError_t as int.
template <typename Params>
int launch(void (*kernel)(Params), const Grid& grid, void* stream, const Params& params) {
  if (grid.x == 0 || grid.y == 0) return cudaSuccess;
  if (grid.x > std::numeric_limits<int>::max() || grid.y > 65535) return cudaErrorInvalidConfiguration;
  driver::Device device;
  int compiled_for;
  cudaError_t error = driver::current_device(device);
  if (error != cudaSuccess) return error;
  error = driver::make_ready(reinterpret_cast<const void*>(kernel), grid.cluster, device, compiled_for);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config = driver::config_of(grid, stream, cluster);
  return driver::cleared(cudaLaunchKernelEx(&config, kernel, params));
}

}  // namespace sait::cuda
