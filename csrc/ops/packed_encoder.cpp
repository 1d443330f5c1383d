// packed_encoder: schema, checks, dispatch.
#include "sait/packed_encoder.h"

#include <algorithm>
#include <vector>

#include "ops/compact_attention.h"
#include "ops/packed_linear.h"
#include "ops/score_tokens.h"
#include "ops/select.h"

namespace sait {
namespace {

constexpr const char* op = "packed_encoder";
constexpr size_t kWeights = 5;  // of a block: qkv, proj, fc1, fc2, and its vectors one after the other

using Vectors = const float* EncoderBlock::*;
// In their order in a block's tensor of vectors; bit i of `present` says whether the i-th is there.
constexpr Vectors kVectors[] = {&EncoderBlock::norm1_weight,     &EncoderBlock::norm1_bias,
                                &EncoderBlock::qkv_bias,         &EncoderBlock::proj_bias,
                                &EncoderBlock::gamma1,           &EncoderBlock::norm2_weight,
                                &EncoderBlock::norm2_bias,       &EncoderBlock::fc1_bias,
                                &EncoderBlock::gate_bias,        &EncoderBlock::hidden_norm_weight,
                                &EncoderBlock::hidden_norm_bias, &EncoderBlock::fc2_bias,
                                &EncoderBlock::gamma2,           &EncoderBlock::q_norm_weight,
                                &EncoderBlock::q_norm_bias,      &EncoderBlock::k_norm_weight,
                                &EncoderBlock::k_norm_bias};
constexpr int64_t kNorms = 0b1100011;                // norm1 and norm2, which are always there
constexpr int64_t kHeadNorms = 0b11110000000000000;  // those of q and k: all or none

int64_t size_of(Vectors vector, const PackedEncoderParams& p) {
  if (vector == &EncoderBlock::qkv_bias) return 3 * p.heads * p.head_dim;
  for (const Vectors of_head : {&EncoderBlock::q_norm_weight, &EncoderBlock::q_norm_bias, &EncoderBlock::k_norm_weight,
                                &EncoderBlock::k_norm_bias}) {
    if (vector == of_head) return p.head_dim;
  }
  const bool of_hidden = vector == &EncoderBlock::fc1_bias || vector == &EncoderBlock::gate_bias ||
                         vector == &EncoderBlock::hidden_norm_weight || vector == &EncoderBlock::hidden_norm_bias;
  return of_hidden ? p.hidden : p.channels;
}

std::vector<EncoderBlock> check_blocks(const Tensor& x, const PackedEncoderParams& p,
                                       const std::vector<Tensor>& weights, int64_t present,
                                       const std::vector<Tensor>& tables) {
  SAIT_CHECK_VALUE(!weights.empty() && weights.size() % kWeights == 0, op, "weights",
                   kWeights << " tensors for each block", weights.size(), "Pass what PackedEncoder made.");
  const int64_t head_norms = present & kHeadNorms;
  SAIT_CHECK_VALUE((present & kNorms) == kNorms && (head_norms == 0 || head_norms == kHeadNorms) &&
                       present < (1 << std::size(kVectors)),
                   op, "vectors", "weight and bias of both norms, and of both heads' norms or none", present,
                   "Pass what PackedEncoder made.");
  int64_t floats = 0;
  for (size_t i = 0; i < std::size(kVectors); ++i) floats += present >> i & 1 ? size_of(kVectors[i], p) : 0;
  const int64_t width = p.heads * p.head_dim;
  std::vector<EncoderBlock> blocks(weights.size() / kWeights);
  SAIT_CHECK_VALUE(tables.empty() || tables.size() == 1 || tables.size() == blocks.size(), op, "tables",
                   "one for all blocks, or " << blocks.size(), tables.size(), "Pass those of the model.");
  for (size_t i = 0; i < blocks.size(); ++i) {
    EncoderBlock& b = blocks[i];
    const Tensor* given = &weights[i * kWeights];
    check_packed(op, "qkv", given[0], x, p.channels, 3 * width, false);
    check_packed(op, "proj", given[1], x, width, p.channels, false);
    check_packed(op, "fc1", given[2], x, p.channels, p.hidden, p.gated);
    check_packed(op, "fc2", given[3], x, p.hidden, p.channels, false);
    const Tensor& vectors = given[4];
    check_device(op, "vectors", vectors, "x", x);
    SAIT_CHECK_TYPE(vectors.scalar_type() == ScalarType::Float, op, "vectors", "dtype Float (float32)",
                    vectors.scalar_type(), "Pass what PackedEncoder made.");
    SAIT_CHECK_VALUE(vectors.dim() == 1 && vectors.size(0) == floats && vectors.is_contiguous(), op, "vectors",
                     "a contiguous tensor of " << floats << " numbers", shape_of(vectors),
                     "Pass what PackedEncoder made.");
    b = {given[0].const_data_ptr(), given[1].const_data_ptr(), given[2].const_data_ptr(), given[3].const_data_ptr()};
    const float* next = vectors.const_data_ptr<float>();
    for (size_t v = 0; v < std::size(kVectors); ++v) {
      if (!(present >> v & 1)) continue;
      b.*kVectors[v] = next;
      next += size_of(kVectors[v], p);
    }
    if (tables.empty()) continue;
    const Tensor& table = tables[tables.size() == 1 ? 0 : i];
    check_device(op, "tables", table, "x", x);
    SAIT_CHECK_TYPE(table.scalar_type() == ScalarType::Float, op, "tables", "dtype Float (float32)",
                    table.scalar_type(), "Make them with .float(), from the start.");
    const bool each_head = table.dim() == 3;
    SAIT_CHECK_VALUE(
        (table.dim() == 2 || (each_head && table.size(0) == p.heads)) && table.size(-2) == p.entries &&
            table.size(-1) == 2 * p.head_dim,
        op, "tables",
        "shape (" << p.entries << ", " << 2 * p.head_dim << "), perhaps with " << p.heads << " heads first",
        shape_of(table), "Pass those of the model.");
    check_last_contiguous(op, "tables", table);
    b.table = table.const_data_ptr<float>();
    b.table_row_stride = table.stride(-2);
    b.table_head_stride = each_head ? table.stride(0) : 0;
  }
  return blocks;
}

// How many rows of each image may be left behind each stage: exactly that many, unless `ragged`, when it is a bound.
struct Capacity {
  std::vector<std::vector<int64_t>> offsets;  // of each stage, and of the result
  bool ragged = false;

  Capacity(const PackedEncoderParams& p, const std::vector<EncoderStage>& stages) {
    const int32_t* cu = p.batch.cu_seqlens;
    std::vector<int64_t> lengths(p.batch.images);
    for (int64_t b = 0; b < p.batch.images; ++b) lengths[b] = cu[b + 1] - cu[b];
    const auto add = [&] {
      std::vector<int64_t>& sum = offsets.emplace_back(1, 0);
      for (const int64_t length : lengths) sum.push_back(sum.back() + length);
    };
    for (const EncoderStage& stage : stages) {
      ragged = ragged || stage.rule.mass > 0;
      for (int64_t b = 0; b < p.batch.images; ++b) {
        const int64_t patches = lengths[b] - std::min(p.num_prefix, lengths[b]);
        const int64_t most = stage.rule.mass == 0      ? checked_patches(op, stage.rule, patches, b)
                             : stage.rule.max_keep < 0 ? patches
                                                       : std::min(patches, stage.rule.max_keep);
        lengths[b] += most - patches;
      }
      add();
    }
    if (p.prefix_only) {
      for (int64_t& length : lengths) length = std::min(length, p.num_prefix);
    }
    add();
  }
};

// Removes the gaps: each image has a capacity of offsets[b + 1] - offsets[b] rows and uses lengths[b] of them. Returns
// the tensor itself if there is no gap.
Tensor compacted(const Tensor& rows, const std::vector<int64_t>& offsets, const int32_t* lengths) {
  const size_t images = offsets.size() - 1;
  int64_t total = 0;
  for (size_t b = 0; b < images; ++b) total += lengths[b];
  if (total == rows.size(0)) return rows;
  const int64_t channels = rows.dim() == 2 ? rows.size(1) : 1, bytes = channels * rows.element_size();
  Tensor out = rows.dim() == 2 ? allocate(rows, {total, channels}) : allocate(rows, {total});
  char* to = out.mutable_data_ptr<char>();
  for (size_t b = 0; b < images; ++b) {
    std::memcpy(to, rows.const_data_ptr<char>() + offsets[b] * bytes, lengths[b] * bytes);
    to += lengths[b] * bytes;
  }
  return out;
}

KeepRule rule_of(double rate, double mass, int64_t count, int64_t min_keep, int64_t max_keep) {
  if (mass > 0) return mass_rule(op, mass, min_keep, max_keep < 0 ? std::nullopt : std::optional(max_keep));
  return topk_rule(op, rate > 0 ? std::optional(rate) : std::nullopt, count > 0 ? std::optional(count) : std::nullopt);
}

std::vector<EncoderStage> check_stages(const std::vector<int64_t>& numbers, const std::vector<double>& shares,
                                       int64_t blocks, int64_t num_prefix) {
  constexpr size_t kNumbers = 5, kShares = 2;  // block, kind, count, min_keep, max_keep; rate, mass
  SAIT_CHECK_VALUE(numbers.size() % kNumbers == 0 && numbers.size() / kNumbers == shares.size() / kShares &&
                       shares.size() % kShares == 0,
                   op, "stages", "5 numbers and 2 shares for each stage", numbers.size() << " and " << shares.size(),
                   "Pass EncoderStage.");
  std::vector<EncoderStage> stages;
  int64_t last = -1;
  for (size_t i = 0; i < numbers.size() / kNumbers; ++i) {
    const int64_t* n = &numbers[i * kNumbers];
    SAIT_CHECK_VALUE(n[0] > last && n[0] < blocks, op, "stages", "blocks in ascending order below " << blocks, n[0],
                     "Pass at most one stage for a block.");
    last = n[0];
    constexpr const char* kKinds[] = {"cls", "column", "cls_value"};
    SAIT_CHECK_VALUE(n[1] >= 0 && n[1] < 3, op, "stages", "a kind of score from 0 to 2", n[1], "Pass EncoderStage.");
    stages.push_back({n[0], score_kind(op, kKinds[n[1]], num_prefix),
                      rule_of(shares[i * kShares], shares[i * kShares + 1], n[2], n[3], n[4]), nullptr, nullptr,
                      nullptr});
  }
  return stages;
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> packed_encoder(
    const Tensor& x, const Tensor& cu_seqlens, int64_t max_seqlen, const std::vector<Tensor>& weights, int64_t heads,
    int64_t head_dim, int64_t hidden_features, int64_t num_prefix, double eps1, double eps2, double hidden_eps,
    double head_eps, std::optional<double> scale, std::string_view activation, bool gated, int64_t present,
    const OptionalTensor& positions, const std::vector<Tensor>& tables, bool pairs,
    const std::vector<int64_t>& stage_numbers, const std::vector<double>& stage_shares, bool prefix_only) {
  check_rows(op, "x", x);
  check_norm(op, x, eps1);
  check_eps(op, "eps2", eps2);
  SAIT_CHECK_VALUE(heads >= 1 && head_dim >= 8 && head_dim % 8 == 0 && head_dim <= 256, op, "heads",
                   "at least one, of a multiple of 8 channels, from 8 to 256", heads << " of " << head_dim,
                   "Pass those of the model.");
  SAIT_CHECK_VALUE(hidden_features >= 1, op, "hidden_features", "a number >= 1", hidden_features,
                   "Pass the weight's shape[0].");
  check_cu_seqlens(op, "cu_seqlens", cu_seqlens, x, x.size(0), max_seqlen, num_prefix);
  PackedEncoderParams p{};
  p.x = row_view(x), p.batch = batch_view(cu_seqlens, max_seqlen);
  SAIT_CHECK_VALUE(p.batch.cu_seqlens[p.batch.images] == x.size(0), op, "cu_seqlens",
                   "a last value of " << x.size(0) << ", the number of rows", p.batch.cu_seqlens[p.batch.images],
                   "Rows of no image are not served here: cut them off.");
  p.channels = x.size(1), p.heads = heads, p.head_dim = head_dim, p.hidden = hidden_features;
  p.num_prefix = num_prefix, p.eps1 = static_cast<float>(eps1), p.eps2 = static_cast<float>(eps2);
  p.hidden_eps = static_cast<float>(hidden_eps), p.head_eps = static_cast<float>(head_eps);
  p.scale = static_cast<float>(check_scale(op, scale, head_dim));
  p.activation = activation_of(op, activation), p.gated = gated, p.pairs = pairs, p.dtype = dtype_of(x);
  p.prefix_only = prefix_only;
  SAIT_CHECK_VALUE(positions.has_value() == !tables.empty(), op, "positions", "them and tables, or neither",
                   "one of them", "Pass both.");
  if (positions) {
    p.entries = tables[0].dim() >= 2 ? tables[0].size(-2) : 0;
    check_positions(op, *positions, x, p.entries);
    p.positions = positions->const_data_ptr<int32_t>();
  }
  const std::vector<EncoderBlock> blocks = check_blocks(x, p, weights, present, tables);
  p.blocks = blocks.data(), p.count = static_cast<int64_t>(blocks.size());
  std::vector<EncoderStage> stages = check_stages(stage_numbers, stage_shares, p.count, num_prefix);
  SAIT_CHECK_VALUE(!prefix_only || stages.empty() || stages.back().block + 1 < p.count, op, "prefix_only",
                   "no stage in the last block", "one", "Leave out one of them.");

  const int64_t images = p.batch.images;
  const Capacity capacity(p, stages);
  if (prefix_only) stages.push_back({});
  const size_t count = stages.size();
  const auto ints = [&](Sizes sizes) { return allocate(x, sizes, ScalarType::Int); };
  std::vector<Tensor> rows, offsets;  // of each stage
  std::vector<int32_t> lengths((count + 1) * images);
  for (size_t i = 0; i < count; ++i) {
    rows.push_back(ints({capacity.offsets[i].back()}));
    stages[i].offsets = capacity.offsets[i].data();
    stages[i].rows = rows[i].mutable_data_ptr<int32_t>();
    stages[i].lengths = &lengths[i * images];
  }
  p.stages = stages.data(), p.stage_count = static_cast<int64_t>(count);
  if (prefix_only) p.leaving = stages.back(), --p.stage_count;
  Tensor out = allocate(x, {capacity.offsets.back().back(), p.channels});
  p.offsets = capacity.offsets.back().data(), p.out = out.mutable_data_ptr(), p.lengths = &lengths[count * images];
  cpu::packed_encoder(p);

  if (capacity.ragged) out = compacted(out, capacity.offsets.back(), p.lengths);
  for (size_t i = 0; i < count; ++i) {
    if (capacity.ragged) rows[i] = compacted(rows[i], capacity.offsets[i], stages[i].lengths);
    offsets.push_back(ints({images + 1}));
    int32_t* sum = offsets[i].mutable_data_ptr<int32_t>();
    sum[0] = 0;
    for (int64_t b = 0; b < images; ++b) sum[b + 1] = sum[b] + stages[i].lengths[b];
  }
  return {std::move(out), std::move(rows), std::move(offsets)};
}

}  // namespace
}  // namespace sait

STABLE_TORCH_LIBRARY_FRAGMENT(sait, m) {
  m.def(
      "packed_encoder(Tensor x, Tensor cu_seqlens, int max_seqlen, Tensor[] weights, int heads, int head_dim, "
      "int hidden_features, int num_prefix, float eps1, float eps2, float hidden_eps, float head_eps, float? scale, "
      "str activation, bool gated, int vectors, Tensor? positions, Tensor[] tables, bool pairs, int[] stages, float[] "
      "shares, "
      "bool prefix_only) -> (Tensor, Tensor[], Tensor[])");
}

STABLE_TORCH_LIBRARY_IMPL(sait, CPU, m) { m.impl("packed_encoder", sait::boxed<sait::packed_encoder>); }
