// select_topk and select_mass: which rows stay. Patches are ranked by score: the highest first, ties to the lower
// index, NaN last. mass is a cumulative score (top-p).
#pragma once

#include "sait/types.h"

namespace sait {

// How many patches of an image stay. Exactly one of the three rules is set.
struct KeepRule {
  double rate;    // > 0: max(1, ceil(rate * patches))
  int64_t count;  // > 0: that many
  double mass;    // > 0: the fewest whose cumulative score (top-p) reaches this share of the image's sum
  int64_t min_keep;
  int64_t max_keep;  // < 0: no limit
};

struct SelectParams {
  const float* scores;  // (total,)
  Batch batch;
  int64_t num_prefix;
  KeepRule rule;
  const int32_t* offsets;  // (images,): the rows that image b keeps are written from indices[offsets[b]] on
  int32_t* indices;
  int32_t* lengths;  // (images,): how many rows image b keeps; or nullptr
};

namespace cpu {
// How many patches a rate or a count keeps of an image that has `patches` > 0 of them. Needs no scores.
int64_t topk_patches(const KeepRule& rule, int64_t patches);

// Writes the rows that the image of rows [begin, end) keeps to `kept`, ascending, prefix rows included; returns how
// many. Nothing is written beyond them. scores[0] is the score of row `begin`. A count must not exceed the image's
// patches.
int64_t select_image(const float* scores, int64_t begin, int64_t end, int64_t num_prefix, const KeepRule& rule,
                     int32_t* kept);

void select(const SelectParams& params);
}  // namespace cpu

namespace cuda {
// Two cases. Known: a rate or a count decides, and the batch has images * max_seqlen rows. Then an image of max_seqlen
// tokens keeps `rows` rows, and each block works out from lengths alone where its rows start. Unknown: rows is 0, and
// blocks tell each other through `kept` how many rows their images keep (see keep_rows.cuh).
struct KeptRowsParams {
  const float* scores;  // (total,); nullptr in score_select, which computes them
  Batch batch;
  int64_t num_prefix;
  KeepRule rule;
  int64_t rows;  // known: what an image of max_seqlen tokens keeps, prefix rows included; unknown: 0
  int64_t total;  // rows of the batch; as an index it means "no row"
  int32_t* indices;  // (size,): the kept rows of all images, one image behind the other, kept[images] in all
  int64_t size;  // known: images * rows; unknown: a bound on the rows that stay
  bool fills;  // whether indices behind the kept rows are set to `total`
  // Known: (images + 1,), the cu_seqlens of the kept rows. Unknown: kept_size(images) zeros. They begin with those
  // cu_seqlens; the flag behind them becomes 1 if a count exceeds the patches of an image. The rest is scratch.
  int32_t* kept;
  int32_t* spread;  // (total,) of scratch if unknown and max_seqlen > kMostRowsInShared; else nullptr
};

constexpr int64_t kMostRowsInShared = 4096;  // 16 KB

constexpr int kSelectThreads = 128;  // of a block, which reads the lengths of the 128 images of its group, one a thread

// In this order: cu_seqlens (images + 1), the flag "an image has too few patches", the ticket that deals out images,
// the number of kept rows of each image, and where the first image of each group of 128 starts among the kept rows.
constexpr int64_t kept_size(int64_t images) { return (images + 1) + 2 + images + (images / kSelectThreads + 1); }

// One launch on `stream` (a cudaStream_t). Returns a cudaError_t as int.
int select(const KeptRowsParams& params, void* stream);
}  // namespace cuda

}  // namespace sait
