// packed_embed: images cut into patches that do not overlap, each through a linear layer whose weight is packed, as the
// rows that a transformer's first block takes: behind the prefix rows of their image, and with their positions added.
#pragma once

#include "sait/packed_linear.h"
#include "sait/types.h"

namespace sait {

struct PackedEmbedParams {
  const void* images;  // (count, channels, height, width); a row's pixels lie side by side
  int64_t count, channels, patch_height, patch_width, columns;  // columns of patches
  int64_t image_stride, channel_stride, row_stride;
  const void* prefix;  // (num_prefix, outputs), contiguous: the same rows for each image
  int64_t num_prefix;
  // Of one image's patches: their number is `rows`, in raster order; an input is at (channel, row, column) of its patch.
  // The residual is their positions. x is what the kernel makes; out is (count * (num_prefix + rows), outputs).
  PackedLinearParams linear;
};

namespace cpu {
void packed_embed(const PackedEmbedParams& params);
}  // namespace cpu

}  // namespace sait
