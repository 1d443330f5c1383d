// What launch.cuh asks of the driver, and when: `launches <check>` prints "right", or what is wrong.
#include "../../csrc/cuda/launch.cuh"

#include <cstdio>
#include <map>
#include <string>
#include <thread>
#include <vector>

using namespace sait::cuda;

namespace {

struct Params {
  int* sum;
};

void adds_one(Params p) {
  if (threadIdx.x == 0) ++*p.sum;
}

const auto kernel = reinterpret_cast<const void*>(&adds_one);
int sum = 0;

int launch_with(int shared_bytes, int cluster = 1) {
  return launch(adds_one, {.x = cluster, .threads = 32, .shared_bytes = shared_bytes, .cluster = cluster}, nullptr,
                Params{&sum});
}

// A launch with little shared memory leaves the others theirs: a thread may be about to launch with more.
std::string limits() {
  for (const int bytes : {100 << 10, 1 << 10, 60 << 10}) {
    if (launch_with(bytes) != cudaSuccess) return "a launch failed";
    cudaFuncAttributes attributes;
    cudaFuncGetAttributes(&attributes, kernel);
    if (attributes.maxDynamicSharedSizeBytes != 227 << 10) return "the kernel may not have all shared memory";
  }
  return "right";
}

std::string threads() {
  std::vector<std::thread> launching;
  std::vector<int> failed(4);
  for (int t = 0; t < 4; ++t) {
    launching.emplace_back([t, &failed] {
      for (int i = 0; i < 200; ++i) failed[t] += launch_with((50 + 40 * t) << 10) != cudaSuccess;
    });
  }
  for (std::thread& thread : launching) thread.join();
  for (const int count : failed) {
    if (count != 0) return std::to_string(count) + " launches of a thread failed";
  }
  return sum == 800 ? "right" : "some launches did not run";
}

std::string questions() {
  const Grid grid{.x = 2, .threads = 32, .shared_bytes = 60 << 10, .cluster = 2};
  Grid larger = grid;
  larger.shared_bytes = 61 << 10;
  for (const int device : {0, 1}) {
    cudaSetDevice(device);
    for (int i = 0; i < 3; ++i) {
      if (!runs_clusters(adds_one, grid) || !runs_clusters(adds_one, larger)) return "no clusters";
      if (launch_with(60 << 10) != cudaSuccess || launch_with(0, 2) != cudaSuccess) return "a launch failed";
    }
  }
  const std::map<std::string, int> once = {{"cudaDeviceGetAttribute", 2 * 3},
                                           {"cudaFuncGetAttributes", 2},
                                           {"cudaFuncSetAttribute", 2},
                                           {"cudaOccupancyMaxActiveClusters", 2 * 2}};
  for (const auto& [name, count] : sait::emulation::driver.calls()) {
    if (once.at(name) != count) return name + " was called " + std::to_string(count) + " times";
  }
  return "right";
}

std::string large_clusters() {
  if (launch_with(0, 8) != cudaSuccess) return "a cluster of 8 failed";
  if (launch_with(0, 16) != cudaSuccess) return "a cluster of 16 failed";
  return launch_with(0, 17) == cudaErrorInvalidClusterSize ? "right" : "a cluster of 17 did not fail";
}

std::string own_errors() {
  if (launch_with(1 << 20) != cudaErrorInvalidValue) return "a launch with too much shared memory did not fail";
  if (cudaGetLastError() != cudaSuccess) return "the error of a launch waits for whoever comes next";
  if (launch(adds_one, {.x = int64_t{1} << 32, .threads = 32}, nullptr, Params{&sum}) == cudaSuccess) {
    return "a launch of 2^32 blocks did not fail";
  }
  return "right";
}

std::string errors_of_others() {
  cudaSetDevice(99);
  if (launch_with(60 << 10) != cudaSuccess || sum != 1) return "a launch was blamed for what failed before it";
  return cudaGetLastError() == cudaErrorInvalidDevice ? "right" : "an error was taken from whom it belongs to";
}

// A kernel that is not there for this device: every question about it fails, and none is left behind.
std::string no_code() {
  if (launch_with(0) != cudaErrorNoKernelImageForDevice) return "a launch without code did not fail";
  if (runs_clusters(adds_one, {.x = 2, .threads = 32, .cluster = 2})) return "there are clusters without code";
  return cudaGetLastError() == cudaSuccess ? "right" : "an error waits for whoever comes next";
}

std::string clusters() {
  const bool runs = runs_clusters(adds_one, {.x = 4, .threads = 32, .shared_bytes = 60 << 10, .cluster = 2});
  if (cudaGetLastError() != cudaSuccess) return "an error waits for whoever comes next";
  return runs ? "clusters" : "no clusters";
}

}  // namespace

int main(int, char** arguments) {
  const std::map<std::string, std::string (*)()> checks = {
      {"limits", limits},       {"threads", threads},
      {"questions", questions}, {"own_errors", own_errors},
      {"no_code", no_code},     {"errors_of_others", errors_of_others},
      {"clusters", clusters},   {"large_clusters", large_clusters}};
  std::puts(checks.at(arguments[1])().c_str());
}
