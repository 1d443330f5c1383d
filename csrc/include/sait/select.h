// select_topk and select_mass: which rows stay. Order: higher score first, ties to the lower index, NaN lowest.
#pragma once

#include "sait/types.h"

namespace sait {

// How many patches of an image stay. Exactly one of the three rules is set.
struct KeepRule {
  double rate;    // > 0: max(1, ceil(rate * patches))
  int64_t count;  // > 0: that many
  double mass;    // > 0: the smallest number that carries this share of the score
  int64_t min_keep;
  int64_t max_keep;  // < 0: no limit
};

struct SelectParams {
  const float* scores;  // (total,)
  Batch batch;
  int64_t num_prefix;
  KeepRule rule;
  const int32_t* offsets;  // (images,): the rows that image b keeps go to indices[offsets[b]] and on
  int32_t* indices;
  int32_t* lengths;  // (images,): how many rows image b keeps; or nullptr
};

namespace cpu {
// The patches that the rate or the count of `rule` keeps, for an image that has patches: known without its scores.
int64_t topk_patches(const KeepRule& rule, int64_t patches);

// Writes the rows that image [begin, end) keeps, ascending, prefix rows included; returns how many, and writes no more.
// `scores` is indexed from 0 = row `begin`. A count must not exceed the image's patches.
int64_t select_image(const float* scores, int64_t begin, int64_t end, int64_t num_prefix, const KeepRule& rule,
                     int32_t* kept);

void select(const SelectParams& params);
}  // namespace cpu

namespace cuda {
struct KeptRowsParams {
  const float* scores;  // (total,); nullptr in score_select
  Batch batch;
  int64_t num_prefix;
  KeepRule rule;
  int64_t rows;  // that an image of max_seqlen tokens keeps, where as many rows as such images have are given; else 0
  int64_t total;  // of the batch
  int32_t* indices;  // (size,), of which the first cu_seqlens[images] are written
  int64_t size;  // images * rows; where rows is 0, any number that is enough
  bool fills;  // whether the others become `total`, which is no row
  // (images + 1,) the rows' cu_seqlens. Where rows is 0, kept_size(images) zeros, of which these are the first; the next
  // one becomes 1 where the count is above the patches of an image.
  int32_t* kept;
  int32_t* spread;  // (total,) of scratch where rows is 0 and images may have more than kMostRowsInShared; else nullptr
};

constexpr int64_t kMostRowsInShared = 4096;  // 16 KB

constexpr int kSelectThreads = 128;  // of a block, which looks at the lengths of as many images

// cu_seqlens, whether an image has too few, a ticket, the length of each image, and where each 128th image starts.
constexpr int64_t kept_size(int64_t images) { return (images + 1) + 2 + images + (images / kSelectThreads + 1); }

// One launch on stream (a cudaStream_t) each; a cudaError_t as int.
int select(const KeptRowsParams& params, void* stream);
}  // namespace cuda

}  // namespace sait
