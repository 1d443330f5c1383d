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
};

namespace cpu {
// Writes the rows that image [begin, end) keeps, ascending, prefix rows included; returns how many. `kept` holds end -
// begin entries. `scores` is indexed from 0 = row `begin`.
int64_t select_image(
    const float* scores, int64_t begin, int64_t end, int64_t num_prefix, const KeepRule& rule, int32_t* kept);
}  // namespace cpu

}  // namespace sait
