// prune_attention in one launch: score, select and attend, where the number of rows that stay is known.
#pragma once

#include "sait/select.h"
#include "sait/types.h"

namespace sait {

struct PruneAttentionParams {
  HeadView q, k, v;
  Batch batch;
  int64_t heads, head_dim;
  int64_t num_prefix;
  KeepRule rule;  // a rate or a count
  int64_t rows;   // that an image of max_seqlen tokens keeps, prefix rows included
  int64_t total;  // images * max_seqlen; shorter images leave a tail
  DType dtype;
  float scale;
  void* out;                 // (images * rows, heads * head_dim), contiguous; zeros behind the rows that stay
  int32_t* indices;          // (images * rows,); behind the rows that stay `total`, which is no row
  int32_t* kept_cu_seqlens;  // (images + 1,)
};

namespace cuda {
// Whether the current device can: it runs clusters of as many blocks as there are heads, with shared memory for an image.
bool prunes_in_one_launch(const PruneAttentionParams& params);
// The score is `cls`. What compact_attention asks of q, k and v holds here, too.
// Launches on stream (a cudaStream_t); returns a cudaError_t as int.
int prune_attention(const PruneAttentionParams& params, void* stream);
}  // namespace cuda

}  // namespace sait
