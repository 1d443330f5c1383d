// Kernels that the emulation must run rightly, and kernels with one fault each that it must show. `planted <kernel>`
// prints "right" or "wrong"; `planted convert` reads floats and writes their bits as bfloat16 and half.
#include "../../csrc/cuda/launch.cuh"

#include <cstdio>
#include <map>
#include <string>
#include <vector>

using namespace sait::cuda;

namespace {

constexpr int kThreads = 128;

struct Params {
  const int* x;
  int* out;
};

template <typename T>
T* shared() {
  return reinterpret_cast<T*>(shared_memory());
}

// out = x reversed within the block.
template <bool synced>
void reverse(Params p) {
  int* numbers = shared<int>();
  const int t = threadIdx.x, at = blockIdx.x * kThreads + t;
  numbers[t] = p.x[at];
  if constexpr (synced) sync_block();
  p.out[at] = numbers[kThreads - 1 - t];
}

void reads_outside(Params p) {
  int* numbers = shared<int>();
  const int t = threadIdx.x, at = blockIdx.x * kThreads + t;
  numbers[t] = p.x[at];
  sync_block();
  p.out[at] = numbers[kThreads - t];
}

// out = x, by way of asynchronous copies in two groups; `pending` of them may be under way when they are read.
template <int pending>
void copies(Params p) {
  int* numbers = shared<int>();
  const int t = threadIdx.x, first = blockIdx.x * kThreads;
  if (t < kThreads / 8) copy_async_16(numbers + 4 * t, p.x + first + 4 * t);
  copies_commit();
  if (t < kThreads / 8) copy_async_16(numbers + kThreads / 2 + 4 * t, p.x + first + kThreads / 2 + 4 * t);
  copies_commit();
  copies_wait<pending>();
  sync_block();
  p.out[first + t] = numbers[t];
  copies_wait<0>();
}

void leaves_copies(Params p) {
  if (threadIdx.x < kThreads / 4) copy_async_16(shared<int>() + 4 * threadIdx.x, p.x + 4 * threadIdx.x);
}

// A copy into memory that others still read: nothing else keeps it from landing early.
void copies_too_early(Params p) {
  int* numbers = shared<int>();
  const int t = threadIdx.x, at = blockIdx.x * kThreads + t;
  numbers[t] = p.x[at];
  sync_block();
  p.out[at] = numbers[kThreads - 1 - t];
  copy_async_16(numbers + t / 4 * 4, p.x);
  copies_commit();
  copies_wait<0>();
}

void barriers_apart(Params) {
  if (threadIdx.x < kThreads / 2) {
    sync_block();
  } else {
    sync_block();
  }
}

void waits_for_ever(Params) {
  if (threadIdx.x == 0) sync_warp();
  else sync_block();
}

void shuffles_apart(Params p) {
  const int t = threadIdx.x;
  if (t % 2 == 0) p.out[t] = shuffle_xor(t, 2);
  else p.out[t] = reduce_add(t);
}

void ends_early(Params p) {
  if (threadIdx.x == 5) return;
  p.out[threadIdx.x] = shuffle_xor(p.x[threadIdx.x], 1);
}

// out = x with the numbers of each warp in reverse order, by every kind of exchange.
void exchanges(Params p) {
  const int t = threadIdx.x, lane = t % kWarpSize, at = blockIdx.x * kThreads + t;
  const int sum = reduce_add(lane), top = reduce_max(lane), low = reduce_min(-lane);
  const bool right = sum == 496 && top == 31 && low == -31 && ballot(lane % 3 == 0) == 0x49249249u &&
                     shuffle_up(lane, 3) == (lane < 3 ? lane : lane - 3) && shuffle(lane, 7) == 7;
  const int reversed = shuffle_xor(p.x[at], kWarpSize - 1);
  p.out[at / kWarpSize * kWarpSize + lane] = right ? reversed : -1;
}

// 1 + a b, for a[i][k] = i + 2 k and b[k][j] = 3 k - j. The matrices are read `shift` bytes behind where they lie.
template <typename T, int shift>
void product(Params p) {
  T* numbers = shared<T>();  // a (16, 16), then b (16, 8)
  const int lane = threadIdx.x;
  const auto rounded = [](int number) { return T{static_cast<uint16_t>(pack(number, 0, T()))}; };
  for (int i = lane; i < 256; i += kWarpSize) numbers[i] = rounded(i / 16 + 2 * (i % 16));
  for (int i = lane; i < 128; i += kWarpSize) numbers[256 + i] = rounded(3 * (i / 8) - i % 8);
  sync_warp();
  uint32_t a[4], b[4];
  load_matrices_4(a, shared_memory() + shift + 32 * (lane % 16) + 16 * (lane / 16));
  load_matrices_4_transposed(b, numbers + 256 + (lane % 16) * 8);
  float c[4] = {1, 1, 1, 1};
  multiply_add(c, a, b[0], b[1], T());
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
    p.out[row * 8 + column] = static_cast<int>(c[i]);
  }
}

// out = x with the blocks of a cluster exchanged, by writing into one another's memory.
template <bool started, bool finished>
void across(Params p) {
  int* numbers = shared<int>();
  const int t = threadIdx.x, at = blockIdx.x * kThreads + t;
  if constexpr (started) {
    cluster_arrive();
    cluster_wait();
  }
  in_block(numbers, cluster_rank() ^ 1)[t] = p.x[at];
  cluster_arrive();
  cluster_wait();
  const int mine = numbers[t];
  const int theirs = in_block(numbers, cluster_rank() ^ 1)[t];
  if constexpr (finished) {
    cluster_arrive();
    cluster_wait();
  }
  p.out[at] = theirs == p.x[at] ? mine : -1;
}

// Reads a block that may have ended.
void outlives(Params p) {
  const int t = threadIdx.x, at = blockIdx.x * kThreads + t;
  shared<int>()[t] = p.x[at];
  cluster_arrive();
  cluster_wait();
  p.out[at] = in_block(shared<int>(), cluster_rank() ^ 1)[t];
}

// A launch without clusters is one with clusters of one block.
void alone(Params p) {
  cluster_arrive();
  cluster_wait();
  const int at = blockIdx.x * kThreads + threadIdx.x;
  p.out[at] = p.x[at] + cluster_rank();
}

constexpr int kBlocks = 8, kCount = kBlocks * kThreads;

bool run(const std::string& name) {
  std::vector<int> x(kCount), out(kCount, -1), want(kCount);
  for (int i = 0; i < kCount; ++i) x[i] = 3 * i + 1;
  const Params params{x.data(), out.data()};
  const Grid whole{.x = kBlocks, .threads = kThreads, .shared_bytes = kThreads * 4};
  const Grid pairs{.x = kBlocks, .threads = kThreads, .shared_bytes = kThreads * 4, .cluster = 2};
  const Grid warp{.x = 1, .threads = kWarpSize, .shared_bytes = 1024};

  struct Case {
    void (*kernel)(Params);
    Grid grid;
    int (*from)(int);  // out[i] = x[from(i)]; without it, the product of two matrices
  };
  const auto in_block_order = [](int i) { return i; };
  const auto block_reversed = [](int i) { return i / kThreads * kThreads + kThreads - 1 - i % kThreads; };
  const auto warp_reversed = [](int i) { return i / kWarpSize * kWarpSize + kWarpSize - 1 - i % kWarpSize; };
  const auto exchanged = [](int i) { return i ^ kThreads; };
  const std::map<std::string, Case> cases = {
      {"reverse", {reverse<true>, whole, block_reversed}},
      {"exchanges", {exchanges, whole, warp_reversed}},
      {"copies", {copies<0>, whole, in_block_order}},
      {"product_bfloat16", {product<__nv_bfloat16, 0>, warp, nullptr}},
      {"product_half", {product<__half, 0>, warp, nullptr}},
      {"across", {across<true, true>, pairs, exchanged}},
      {"alone", {alone, whole, in_block_order}},
      {"no_barrier", {reverse<false>, whole, block_reversed}},
      {"reads_outside", {reads_outside, whole, block_reversed}},
      {"no_wait", {copies<1>, whole, in_block_order}},
      {"leaves_copies", {leaves_copies, whole, in_block_order}},
      {"copies_too_early", {copies_too_early, whole, block_reversed}},
      {"barriers_apart", {barriers_apart, whole, in_block_order}},
      {"waits_for_ever", {waits_for_ever, whole, in_block_order}},
      {"shuffles_apart", {shuffles_apart, whole, in_block_order}},
      {"ends_early", {ends_early, whole, in_block_order}},
      {"misaligned", {product<__half, 8>, warp, nullptr}},
      {"matrix_outside", {product<__half, 768>, warp, nullptr}},
      {"not_started", {across<false, true>, pairs, exchanged}},
      {"outlives", {outlives, pairs, exchanged}},
  };
  const Case& asked = cases.at(name);
  const int error = launch(asked.kernel, asked.grid, nullptr, params);
  if (error != cudaSuccess) {
    std::printf("error %d: %s\n", error, cudaGetErrorString(static_cast<cudaError_t>(error)));
    return false;
  }
  bool right = true;
  if (asked.from != nullptr) {
    for (int i = 0; i < kCount; ++i) right = right && out[i] == x[asked.from(i)];
  } else {
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 8; ++j) {
        int sum = 1;
        for (int k = 0; k < 16; ++k) sum += (i + 2 * k) * (3 * k - j);
        right = right && out[i * 8 + j] == sum;
      }
    }
  }
  return right;
}

void convert() {
  float x;
  while (std::fread(&x, sizeof(x), 1, stdin) == 1) {
    const uint32_t bits[] = {pack(x, x, __nv_bfloat16()), pack(x, x, __half())};
    const uint16_t low[] = {static_cast<uint16_t>(bits[0]), static_cast<uint16_t>(bits[1])};
    const float back[] = {unpack(bits[0], __nv_bfloat16()).x, unpack(bits[1], __half()).y};
    std::fwrite(low, sizeof(low), 1, stdout);
    std::fwrite(back, sizeof(back), 1, stdout);
  }
}

}  // namespace

int main(int, char** arguments) {
  const std::string name = arguments[1];
  if (name == "convert") convert();
  else std::puts(run(name) ? "right" : "wrong");
}
