// packed_linear: out[t] = x'[indices[t]] + gamma * act(z[t] weight^T + bias), z = LayerNorm(x) or x; with a gate
// act(z[t] gate^T + gate_bias) * (z[t] weight^T + bias) takes the place of act(...). And pack_linear, which brings the
// weight into the order in which the GEMM reads it.
#pragma once

#include "sait/types.h"

namespace sait {

// By their names in sait_kernels/activation.py. GELU in its erf form, then in its tanh form; quick GELU is
// x sigmoid(1.702 x).
enum class Activation : int32_t { kNone, kGelu, kGeluTanh, kQuickGelu, kSilu };

// A packed weight is (blocks, depth, kPackedColumns). Block b holds the output columns from b * kPackedColumns on,
// padded with zeros behind the last one. depth is the number of inputs. For two-byte types an odd number is padded by
// one input of zeros, and inputs lie in pairs: element (k, n) is at k / 2 * 2 * kPackedColumns + 2 * n + k % 2 (VNNI
// order). With a gate a block holds half as many outputs: first their columns of the gate, then those of the weight, so
// that one tile of the GEMM has both halves of an output.
constexpr int64_t kPackedColumns = 64;

constexpr int64_t packed_outputs(bool gated) { return gated ? kPackedColumns / 2 : kPackedColumns; }  // of a block
constexpr int64_t packed_blocks(int64_t outputs, bool gated) {
  return (outputs + packed_outputs(gated) - 1) / packed_outputs(gated);
}
constexpr int64_t packed_depth(int64_t inputs, DType dtype) {
  return dtype == DType::kFloat32 ? inputs : (inputs + 1) / 2 * 2;
}

struct PackLinearParams {
  RowView weight;  // (outputs, inputs)
  RowView gate;    // the same; data is nullptr where there is none
  int64_t outputs, inputs;
  DType dtype;
  void* packed;  // (packed_blocks, packed_depth, kPackedColumns)
};

struct PackedLinearParams {
  RowView x;  // (rows, inputs)
  const void* packed;
  bool gated;
  const float* bias;         // (outputs,) or nullptr
  const float* gate_bias;    // (outputs,) or nullptr
  const float* norm_weight;  // (inputs,), or nullptr: x is taken as it is
  const float* norm_bias;    // (inputs,)
  float eps;
  Activation activation;
  RowView residual;        // (total, outputs); data is nullptr where nothing is added
  const int32_t* indices;  // (rows,) of the residual; nullptr: row t for row t
  int64_t total;
  const float* gamma;  // (outputs,) or nullptr
  int64_t rows, inputs, outputs;
  DType dtype;
  void* out;  // (rows, outputs), contiguous
};

// All of a block that follows its attention, row by row: x' = residual[indices[t]] + gamma (proj x), and then
// x' + gamma2 fc2(fc1(LayerNorm(x'))), with activation and gate in fc1 and perhaps a LayerNorm in fc2. Each is a
// packed_linear, rounded as if it were called alone.
struct PackedBlockParams {
  PackedLinearParams proj;  // with the residual stream
  PackedLinearParams fc1;   // x is what proj gives; out is scratch of the kernel's
  PackedLinearParams fc2;   // x is that scratch, residual and out are those of proj's result
};

namespace cpu {
void pack_linear(const PackLinearParams& params);
void packed_linear(const PackedLinearParams& params);
void packed_block(const PackedBlockParams& params);
}  // namespace cpu

}  // namespace sait
