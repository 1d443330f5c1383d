// prune_attention in one launch: score, select and attend, for images of equal length.
#pragma once

#include "sait/select.h"
#include "sait/types.h"

namespace sait {

struct PruneAttentionParams {
  HeadView q, k, v;
  Batch batch;  // every image has max_seqlen tokens
  int64_t heads, head_dim;
  int64_t num_prefix;
  KeepRule rule;  // a rate or a count
  int64_t rows;   // that each image keeps, prefix rows included
  DType dtype;
  float scale;
  void* out;             // (images * rows, heads * head_dim), contiguous
  int32_t* indices;      // (images * rows,)
  int32_t* kept_cu_seqlens;  // (images + 1,)
};

namespace cuda {
// Whether the current device can: it has clusters of as many blocks as there are heads, and shared memory for an image.
bool prunes_in_one_launch(const PruneAttentionParams& params);
// Scores of kind cls. What compact_attention asks of q, k and v holds here, too.
// Launches on stream (a cudaStream_t); returns a cudaError_t as int.
int prune_attention(const PruneAttentionParams& params, void* stream);
}  // namespace cuda

}  // namespace sait
