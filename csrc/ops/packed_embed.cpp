// packed_embed: schema, checks, dispatch.
#include "sait/packed_embed.h"

#include "ops/packed_linear.h"

namespace sait {
namespace {

constexpr const char* op = "packed_embed";

// Rows that are copied or added as they are.
void check_added(const char* name, const Tensor& t, const Tensor& images, int64_t rows, int64_t outputs) {
  check_same(op, name, t, "images", images);
  SAIT_CHECK_VALUE(t.dim() == 2 && t.size(1) == outputs && (rows < 0 || t.size(0) == rows) && t.is_contiguous(), op,
                   name, "contiguous (" << (rows < 0 ? "P" : std::to_string(rows)) << ", " << outputs << ")",
                   shape_of(t), "Bring it into that form once, for all forwards.");
}

Tensor packed_embed(const Tensor& images, const Tensor& packed, int64_t out_features, const OptionalTensor& bias,
                    int64_t patch_height, int64_t patch_width, const OptionalTensor& prefix,
                    const OptionalTensor& positions) {
  SAIT_CHECK_VALUE(images.dim() == 4, op, "images", "(B, channels, height, width)", shape_of(images),
                   "One image is a batch of one: images[None].");
  check_dtype(op, "images", images);
  check_last_contiguous(op, "images", images);
  SAIT_CHECK_VALUE(patch_height >= 1 && patch_width >= 1, op, "patch", "sizes >= 1",
                   patch_height << " x " << patch_width, "Pass the kernel_size of the convolution.");
  const int64_t channels = images.size(1), height = images.size(2), width = images.size(3);
  SAIT_CHECK_VALUE(height > 0 && height % patch_height == 0 && width > 0 && width % patch_width == 0, op, "images",
                   "a height and width of whole patches, at least one, " << patch_height << " x " << patch_width,
                   height << " x " << width, "Resize or pad them.");
  const int64_t inputs = channels * patch_height * patch_width;
  const int64_t rows = height / patch_height, columns = width / patch_width, patches = rows * columns;
  check_packed(op, "packed", packed, images, inputs, out_features, false);
  if (bias) check_channels(op, "bias", *bias, images, out_features);
  if (prefix) check_added("prefix", *prefix, images, -1, out_features);
  if (positions) check_added("positions", *positions, images, patches, out_features);

  PackedEmbedParams p{};
  p.images = images.const_data_ptr(), p.count = images.size(0), p.channels = channels;
  p.patch_height = patch_height, p.patch_width = patch_width, p.columns = columns;
  p.image_stride = images.stride(0), p.channel_stride = images.stride(1), p.row_stride = images.stride(2);
  if (prefix) p.prefix = prefix->const_data_ptr(), p.num_prefix = prefix->size(0);
  const Contiguous bias_in_float(or_null(bias), ScalarType::Float);
  Tensor out = allocate(images, {p.count * (p.num_prefix + patches), out_features});
  p.linear.packed = packed.const_data_ptr(), p.linear.bias = bias_in_float.data<float>();
  if (positions) p.linear.residual = row_view(*positions), p.linear.total = patches;
  p.linear.rows = patches, p.linear.inputs = inputs, p.linear.outputs = out_features;
  p.linear.dtype = dtype_of(images), p.linear.out = out.mutable_data_ptr();
  cpu::packed_embed(p);
  return out;
}

}  // namespace
}  // namespace sait

STABLE_TORCH_LIBRARY_FRAGMENT(sait, m) {
  m.def(
      "packed_embed(Tensor images, Tensor packed, int out_features, Tensor? bias, int patch_height, int patch_width, "
      "Tensor? prefix, Tensor? positions) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sait, CPU, m) { m.impl("packed_embed", sait::boxed<sait::packed_embed>); }
