// From the scores of an image to its rows among those of the batch, in one launch.
//
// Where images are of one length, their places are known. Else an image's place is the sum of the lengths before it: a
// block publishes its image's length, and waits for the others of its 128 images and for the place of the first of them,
// which the last of the 128 before has published. So each block reads 128 numbers whatever the batch, where a last block
// that moved all rows would take 10 us for 256 images; and as images are dealt out in the order in which blocks start,
// who waits does so for blocks that run.
#pragma once

#include "select_rows.cuh"

namespace sait::cuda {

struct KeepScratch {
  SelectScratch select;
  int sums[kSelectThreads / kWarpSize];
  int image;
};

namespace keeping {

// The parts of KeptRowsParams::kept. A number that others wait for is published with 1 added: 0 is none yet.
struct Published {
  int32_t *too_few, *ticket, *lengths, *starts;
};
SAIT_DEVICE Published parts_of(const KeptRowsParams& p) {
  int32_t* rest = p.kept + p.batch.images + 1;
  return {rest, rest + 1, rest + 2, rest + 2 + p.batch.images};
}
SAIT_DEVICE void publish(int32_t* address, int value) { atomic_add(address, value + 1); }
SAIT_DEVICE int wait_for(const volatile int32_t* address) {
  int value;
  while ((value = *address) == 0) {
  }
  return value - 1;
}

// Where an image's rows start, for all threads.
SAIT_DEVICE int start_of(const KeptRowsParams& p, int64_t image, int length, KeepScratch& scratch) {
  const Published published = parts_of(p);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t group = image / kSelectThreads;
  const int before = static_cast<int>(image % kSelectThreads);
  int sum = 0;
  if (thread == 0) publish(published.lengths + image, length);
  if (thread < before) sum = wait_for(published.lengths + group * kSelectThreads + thread);
  if (thread == kSelectThreads - 1 && group > 0) sum = wait_for(published.starts + group);
  sync_warp();
  sum = reduce_add(sum);
  if (thread % kWarpSize == 0) scratch.sums[thread / kWarpSize] = sum;
  sync_block();
  sum = 0;
  for (int part : scratch.sums) sum += part;
  if (thread == 0 && before == kSelectThreads - 1) publish(published.starts + group + 1, sum + length);
  return sum;
}

}  // namespace keeping

// The image of this block.
SAIT_DEVICE int64_t image_to_keep(const KeptRowsParams& p, KeepScratch& scratch) {
  if (p.rows > 0) return blockIdx.x;
  if (threadIdx.x == 0) scratch.image = atomic_add(keeping::parts_of(p).ticket, 1);
  sync_block();
  return scratch.image;
}

// Chooses the rows of an image by scores[0, n) in shared or global memory, visible to all kSelectThreads threads, and
// writes them where they belong. `room` takes n numbers where p.rows is 0.
SAIT_DEVICE void keep_rows(const KeptRowsParams& p, int64_t image, const float* scores, int32_t* room,
                           KeepScratch& scratch) {
  const int32_t begin = p.batch.cu_seqlens[image];
  const int n = p.batch.cu_seqlens[image + 1] - begin;
  const int prefix = static_cast<int>(min(p.num_prefix, int64_t{n}));
  const DeviceRule rule = rule_for(p.rule, n - prefix);
  const bool known = p.rows > 0;
  int32_t* kept = known ? p.indices + image * p.rows : room;
  const int length = select_rows<kSelectThreads>(scores, n, prefix, rule, begin, scratch.select, kept);
  const int start = known ? static_cast<int>(image * p.rows) : keeping::start_of(p, image, length, scratch);
  if (threadIdx.x == 0) {
    if (image == 0) p.kept[0] = 0;
    p.kept[image + 1] = start + length;
    if (!known && n > prefix && p.rule.count > n - prefix) *keeping::parts_of(p).too_few = 1;
  }
  if (known) return;
  for (int i = static_cast<int>(threadIdx.x); i < length; i += kSelectThreads) p.indices[start + i] = room[i];
}

}  // namespace sait::cuda
