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

}  // namespace sait
