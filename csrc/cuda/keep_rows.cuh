// From the scores of an image to its kept rows, at their place among those of the batch, in one launch. A block takes
// one image.
//
// In the known case (see KeptRowsParams) lengths alone tell where an image's rows start: behind the kept rows of all
// images before. Else the blocks learn that from each other. Images form groups of 128. A block publishes how many
// rows its image keeps. It then waits for these numbers of the images before its own in the group, and for where the
// group starts, which the last image of the group before publishes. So a block reads at most 128 numbers, whatever the
// batch. (Were the last block to move all rows, that would take 10 us for 256 images.) Waiting cannot deadlock: images
// are dealt out by a ticket in the order in which blocks start, so a block waits only for blocks that run already.
#pragma once

#include "select_rows.cuh"

namespace sait::cuda {

struct KeepScratch {
  SelectScratch select;
  int sums[kSelectThreads / kWarpSize];
  int image;
};

// The sum over the threads of a block of kSelectThreads, for all of them.
SAIT_DEVICE int sum_of_block(int value, KeepScratch& scratch) {
  value = reduce_add(value);
  if (threadIdx.x % kWarpSize == 0) scratch.sums[threadIdx.x / kWarpSize] = value;
  sync_block();
  value = 0;
  for (int part : scratch.sums) value += part;
  return value;
}

// How many rows stay of the images before `image`, where lengths alone decide that: `rows` of each with max_seqlen
// tokens. If one of them is shorter (the batch then ends in a tail), all their lengths are read. The caller may reuse
// scratch.sums behind the next barrier.
SAIT_DEVICE int rows_before(const Batch& batch, int64_t num_prefix, const KeepRule& rule, int64_t rows, int64_t image,
                            KeepScratch& scratch) {
  if (batch.cu_seqlens[image] == image * batch.max_seqlen) return static_cast<int>(image * rows);
  int sum = 0;
  for (int64_t b = threadIdx.x; b < image; b += kSelectThreads) {
    const int n = batch.cu_seqlens[b + 1] - batch.cu_seqlens[b],
              patches = n - static_cast<int>(min(num_prefix, int64_t{n}));
    sum += n - patches + (patches > 0 ? rule_for(rule, patches).most : 0);
  }
  sync_warp();
  return sum_of_block(sum, scratch);
}

// Writes `total`, which means "no row", to indices [begin, size).
SAIT_DEVICE void fill_with_no_row(int32_t* indices, int64_t begin, int64_t size, int64_t total) {
  for (int64_t i = begin + threadIdx.x; i < size; i += kSelectThreads) indices[i] = static_cast<int32_t>(total);
}

namespace keeping {

// The parts of KeptRowsParams::kept behind the cu_seqlens; see kept_size. They start as 0, which means "not published
// yet": a number that others wait for is published with 1 added.
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

// Where the image's rows start among all kept rows; every thread gets it. Thread t reads the length of the group's
// image t if that comes before this one; the last thread, which never has such a length to read, reads where the group
// starts.
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
  sum = sum_of_block(sum, scratch);
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

// Chooses the rows of an image by scores[0, n), and writes them to their place in p.indices. The scores lie in shared
// or global memory, visible to all kSelectThreads threads. `buffer` has a capacity of n numbers if p.rows is 0, and is
// not used otherwise.
SAIT_DEVICE void keep_rows(const KeptRowsParams& p, int64_t image, const float* scores, int32_t* buffer,
                           KeepScratch& scratch) {
  const int32_t begin = p.batch.cu_seqlens[image];
  const int n = p.batch.cu_seqlens[image + 1] - begin;
  const int prefix = static_cast<int>(min(p.num_prefix, int64_t{n}));
  const DeviceRule rule = rule_for(p.rule, n - prefix);
  const bool known = p.rows > 0;
  int start = known ? rows_before(p.batch, p.num_prefix, p.rule, p.rows, image, scratch) : 0;
  int32_t* kept = known ? p.indices + start : buffer;
  const int length = select_rows<kSelectThreads>(scores, n, prefix, rule, begin, scratch.select, kept);
  if (!known) start = keeping::start_of(p, image, length, scratch);
  if (threadIdx.x == 0) {
    if (image == 0) p.kept[0] = 0;
    p.kept[image + 1] = start + length;
    if (!known && n > prefix && p.rule.count > n - prefix) *keeping::parts_of(p).too_few = 1;
  }
  if (p.fills && image == p.batch.images - 1) fill_with_no_row(p.indices, start + length, p.size, p.total);
  if (known) return;
  const int end = static_cast<int>(min(int64_t{start + length}, p.size));
  for (int i = start + static_cast<int>(threadIdx.x); i < end; i += kSelectThreads) p.indices[i] = buffer[i - start];
}

}  // namespace sait::cuda
