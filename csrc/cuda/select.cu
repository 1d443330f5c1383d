// select_topk and select_mass: one launch, one block per image, with its scores in registers.
#include "keep_rows.cuh"
#include "launch.cuh"

namespace sait::cuda {
namespace {

__global__ void __launch_bounds__(kSelectThreads, 3) select_images(KeptRowsParams p) {
  auto& scratch = *reinterpret_cast<KeepScratch*>(shared_memory());
  auto* buffer = reinterpret_cast<int32_t*>(shared_memory() + sizeof(KeepScratch));
  const int64_t image = image_to_keep(p, scratch);
  const int32_t begin = p.batch.cu_seqlens[image];
  keep_rows(p, image, p.scores + begin, p.spread == nullptr ? buffer : p.spread + begin, scratch);
}

}  // namespace

int select(const KeptRowsParams& params, void* stream) {
  const int64_t buffered = params.rows > 0 || params.spread != nullptr ? 0 : params.batch.max_seqlen;
  const int shared = static_cast<int>(sizeof(KeepScratch) + buffered * sizeof(int32_t));
  return launch(select_images, {.x = params.batch.images, .threads = kSelectThreads, .shared_bytes = shared}, stream,
                params);
}

}  // namespace sait::cuda
