// packed_encoder on the CPU. A thread takes an image, or a few short ones, through all blocks before it turns to the
// next: their rows stay in its cache, the weights stream by, and no thread waits for another between two ops. When
// fewer images than threads are left over, all threads work on them together.
//
// It calls the kernels of the single ops, whose bits depend neither on the batch nor on the number of threads.
#include "sait/packed_encoder.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "cpu/runtime.h"
#include "sait/compact_attention.h"
#include "sait/norm_heads.h"
#include "sait/rotate.h"
#include "sait/score_tokens.h"

namespace sait::cpu {
namespace {

constexpr int64_t kRowsOfTask = 64;  // short images are taken together up to here, so that a weight serves enough rows

// Memory that only grows and is kept between calls, so that nothing is allocated anew. reserve(n) returns a buffer with
// a capacity of at least n elements; growing loses what was in it.
class Buffer {
 public:
  template <typename T = char>
  T* reserve(int64_t elements) {
    const size_t bytes = static_cast<size_t>(elements) * sizeof(T);
    if (bytes > size_) {
      constexpr size_t kAlign = 64;
      size_ = (bytes + kAlign - 1) / kAlign * kAlign;
      memory_.reset(std::aligned_alloc(kAlign, size_));
      if (memory_ == nullptr) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return static_cast<T*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

// What a thread needs on its way through the blocks.
struct Workspace {
  Buffer x[2], qkv, normed, turned, attended, scores;
  Buffer indices, spread, lengths, cu_seqlens[2], rows[2], positions[2];
};

// Some images of the batch, on their way.
class Group {
 public:
  Group(const PackedEncoderParams& p, Workspace& work, int64_t begin, int64_t end)
      : p_(p), work_(work), begin_(begin), images_(end - begin), bytes_(p.dtype == DType::kFloat32 ? 4 : 2) {
    const int32_t *cu = p.batch.cu_seqlens + begin, first = cu[0];
    total_ = cu[images_] - first;
    cu_seqlens_ = work.cu_seqlens[0].reserve<int32_t>(images_ + 1);
    for (int64_t b = 0; b <= images_; ++b) cu_seqlens_[b] = cu[b] - first;
    x_ = {static_cast<const char*>(p.x.data) + first * p.x.row_stride * bytes_, p.x.row_stride};
    if (p.positions != nullptr) positions_ = p.positions + first;
    rows_ = work.rows[0].reserve<int32_t>(total_);
    for (int64_t t = 0; t < total_; ++t) rows_[t] = static_cast<int32_t>(first + t);
  }

  void run() {
    const EncoderStage* stage = p_.stages;
    const EncoderStage* const no_stage = p_.stages + p_.stage_count;
    for (int64_t i = 0; i < p_.count; ++i) {
      const bool drops = stage != no_stage && stage->block == i;
      block(i, drops ? stage : nullptr);
      if (drops) {
        deliver(*stage);
        ++stage;
      }
    }
    if (p_.prefix_only) deliver(p_.leaving);
    deliver_rows();
  }

 private:
  void block(int64_t i, const EncoderStage* stage) {
    const EncoderBlock& b = p_.blocks[i];
    const int64_t width = p_.heads * p_.head_dim;
    char* qkv = work_.qkv.reserve(total_ * 3 * width * bytes_);
    PackedLinearParams project{};
    project.x = x_, project.rows = total_, project.inputs = p_.channels, project.outputs = 3 * width;
    project.packed = b.qkv, project.bias = b.qkv_bias, project.dtype = p_.dtype, project.out = qkv;
    project.norm_weight = b.norm1_weight, project.norm_bias = b.norm1_bias, project.eps = p_.eps1;
    packed_linear(project);

    HeadView q{qkv, 3 * width, p_.head_dim}, k = q, v = q;
    k.data = qkv + width * bytes_, v.data = qkv + 2 * width * bytes_;
    if (b.q_norm_weight != nullptr) {
      char* normed = work_.normed.reserve(2 * total_ * width * bytes_);
      const auto norm = [&](HeadView& heads, const float* weight, const float* bias, char* out) {
        norm_heads({heads, weight, bias, p_.head_eps, total_, p_.heads, p_.head_dim, p_.dtype, out});
        heads = {out, width, p_.head_dim};
      };
      norm(q, b.q_norm_weight, b.q_norm_bias, normed);
      norm(k, b.k_norm_weight, b.k_norm_bias, normed + total_ * width * bytes_);
    }
    if (b.table != nullptr) {
      char* turned = work_.turned.reserve(2 * total_ * width * bytes_);
      rotate({q, k, positions_, b.table, b.table_row_stride, b.table_head_stride, total_, p_.heads, p_.head_dim,
              p_.entries, p_.pairs, false, p_.dtype, turned, turned + total_ * width * bytes_});
      q = {turned, width, p_.head_dim}, k = {turned + total_ * width * bytes_, width, p_.head_dim};
    }

    const bool prefix = stage == nullptr && p_.prefix_only && i + 1 == p_.count;
    Kept kept{nullptr, cu_seqlens_, total_};
    if (stage != nullptr) kept = select(*stage, q, k, v);
    else if (prefix) kept = prefix_rows();
    char* attended = work_.attended.reserve(kept.rows * width * bytes_);
    compact_attention({q, k, v, batch(), kept, total_, p_.heads, p_.head_dim, p_.dtype, p_.scale, attended});

    char* out = work_.x[i % 2].reserve(kept.rows * p_.channels * bytes_);
    PackedBlockParams rest{};
    rest.proj.x = {attended, width}, rest.proj.rows = kept.rows, rest.proj.inputs = width;
    rest.proj.outputs = p_.channels, rest.proj.packed = b.proj, rest.proj.bias = b.proj_bias;
    rest.proj.residual = x_, rest.proj.total = total_, rest.proj.indices = kept.indices, rest.proj.gamma = b.gamma1;
    rest.proj.dtype = p_.dtype, rest.proj.out = out;
    rest.fc1.inputs = p_.channels, rest.fc1.outputs = p_.hidden, rest.fc1.packed = b.fc1, rest.fc1.bias = b.fc1_bias;
    rest.fc1.gated = p_.gated, rest.fc1.gate_bias = b.gate_bias, rest.fc1.activation = p_.activation;
    rest.fc1.norm_weight = b.norm2_weight, rest.fc1.norm_bias = b.norm2_bias, rest.fc1.eps = p_.eps2;
    rest.fc1.dtype = p_.dtype;
    rest.fc2.inputs = p_.hidden, rest.fc2.outputs = p_.channels, rest.fc2.packed = b.fc2, rest.fc2.bias = b.fc2_bias;
    rest.fc2.norm_weight = b.hidden_norm_weight, rest.fc2.norm_bias = b.hidden_norm_bias, rest.fc2.eps = p_.hidden_eps;
    rest.fc2.gamma = b.gamma2, rest.fc2.dtype = p_.dtype, rest.fc2.out = out;
    packed_block(rest);
    x_ = {out, p_.channels};
    if (kept.indices != nullptr) keep(kept);
  }

  Batch batch() const {
    int64_t longest = 0;
    for (int64_t b = 0; b < images_; ++b) longest = std::max<int64_t>(longest, cu_seqlens_[b + 1] - cu_seqlens_[b]);
    return {cu_seqlens_, images_, longest};
  }

  int32_t* next_cu_seqlens() { return work_.cu_seqlens[++selections_ % 2].reserve<int32_t>(images_ + 1); }

  // Each image writes its kept rows where its own rows lie; then they are moved together.
  Kept select(const EncoderStage& stage, const HeadView& q, const HeadView& k, const HeadView& v) {
    const ScoreTokensParams params{
        q,          k,        v,        batch(), total_, p_.heads, p_.head_dim, p_.num_prefix,
        stage.kind, p_.dtype, p_.scale, nullptr, nullptr};
    float* scores = work_.scores.reserve<float>(total_);
    int32_t* spread = work_.spread.reserve<int32_t>(total_);
    int32_t* lengths = work_.lengths.reserve<int32_t>(images_);
    parallel_for(images_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int32_t first = cu_seqlens_[b];
        score_image(params, b, scores + first);
        lengths[b] = static_cast<int32_t>(
            select_image(scores + first, first, cu_seqlens_[b + 1], p_.num_prefix, stage.rule, spread + first));
      }
    });
    int32_t *cu = next_cu_seqlens(), *indices = work_.indices.reserve<int32_t>(total_);
    cu[0] = 0;
    for (int64_t b = 0; b < images_; ++b) {
      std::copy_n(spread + cu_seqlens_[b], lengths[b], indices + cu[b]);
      cu[b + 1] = cu[b] + lengths[b];
    }
    return {indices, cu, cu[images_]};
  }

  Kept prefix_rows() {
    int32_t *cu = next_cu_seqlens(), *indices = work_.indices.reserve<int32_t>(images_ * p_.num_prefix);
    cu[0] = 0;
    for (int64_t b = 0; b < images_; ++b) {
      const int64_t length = std::min<int64_t>(p_.num_prefix, cu_seqlens_[b + 1] - cu_seqlens_[b]);
      for (int64_t i = 0; i < length; ++i) indices[cu[b] + i] = static_cast<int32_t>(cu_seqlens_[b] + i);
      cu[b + 1] = static_cast<int32_t>(cu[b] + length);
    }
    return {indices, cu, cu[images_]};
  }

  // The rows that go on from here.
  void keep(const Kept& kept) {
    const auto gathered = [&](Buffer(&buffers)[2], const int32_t* from) {
      int32_t* to = buffers[selections_ % 2].reserve<int32_t>(kept.rows);
      for (int64_t t = 0; t < kept.rows; ++t) to[t] = from[kept.indices[t]];
      return to;
    };
    rows_ = gathered(work_.rows, rows_);
    if (positions_ != nullptr) positions_ = gathered(work_.positions, positions_);
    cu_seqlens_ = const_cast<int32_t*>(kept.cu_seqlens);
    total_ = kept.rows;
  }

  void deliver(const EncoderStage& stage) const {
    for (int64_t b = 0; b < images_; ++b) {
      const int64_t length = cu_seqlens_[b + 1] - cu_seqlens_[b];
      std::copy_n(rows_ + cu_seqlens_[b], length, stage.rows + stage.offsets[begin_ + b]);
      stage.lengths[begin_ + b] = static_cast<int32_t>(length);
    }
  }

  void deliver_rows() const {
    const int64_t row = p_.channels * bytes_;
    for (int64_t b = 0; b < images_; ++b) {
      const int64_t length = cu_seqlens_[b + 1] - cu_seqlens_[b];
      char* out = static_cast<char*>(p_.out) + p_.offsets[begin_ + b] * row;
      const char* x = static_cast<const char*>(x_.data) + cu_seqlens_[b] * x_.row_stride * bytes_;
      for (int64_t t = 0; t < length; ++t) std::memcpy(out + t * row, x + t * x_.row_stride * bytes_, row);
      p_.lengths[begin_ + b] = static_cast<int32_t>(length);
    }
  }

  const PackedEncoderParams& p_;
  Workspace& work_;
  const int64_t begin_, images_, bytes_;
  int64_t total_, selections_ = 0;  // how often rows were dropped: which of two buffers is free
  RowView x_;
  int32_t *cu_seqlens_, *rows_;
  const int32_t* positions_ = nullptr;
};

}  // namespace

void packed_encoder(const PackedEncoderParams& p) {
  const auto encode = [&p](int64_t begin, int64_t end) {
    static thread_local Workspace work;
    Group(p, work, begin, end).run();
  };
  const int64_t images = p.batch.images, threads = num_threads();
  if (images == 0) return;
  const int64_t mean = std::max<int64_t>(1, p.batch.cu_seqlens[images] / images);
  const int64_t size = std::clamp<int64_t>(kRowsOfTask / mean, 1, std::max<int64_t>(1, images / (4 * threads)));
  const int64_t tasks = images / size / threads * threads;
  parallel_tasks(tasks, [&](int64_t task) { encode(task * size, (task + 1) * size); });
  if (tasks * size < images) encode(tasks * size, images);
}

}  // namespace sait::cpu
