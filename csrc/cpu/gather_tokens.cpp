// gather_tokens and scatter_tokens on the CPU: row copies, threaded over rows.
#include "sait/gather_tokens.h"

#include <algorithm>
#include <cstring>

#include "cpu/runtime.h"

namespace sait::cpu {
namespace {

constexpr int64_t kGrainBytes = 1 << 16;  // below that, one thread copies faster than two can be woken

int64_t grain(int64_t row_bytes) { return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, row_bytes)); }

}  // namespace

void gather_tokens(const GatherTokensParams& p) {
  const char* x = static_cast<const char*>(p.x);
  char* out = static_cast<char*>(p.out);
  parallel_for(p.rows, grain(p.row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      char* row = out + i * p.row_bytes;
      if (p.indices[i] < p.total) std::memcpy(row, x + p.indices[i] * p.x_row_stride, p.row_bytes);
      else std::memset(row, 0, p.row_bytes);
    }
  });
}

void scatter_tokens(const ScatterTokensParams& p) {
  const char* y = static_cast<const char*>(p.y);
  const char* base = static_cast<const char*>(p.base);
  char* out = static_cast<char*>(p.out);
  parallel_for(p.total, grain(p.row_bytes), [&](int64_t begin, int64_t end) {
    int64_t next = std::lower_bound(p.indices, p.indices + p.rows, begin) - p.indices;  // indices ascend, `total` last
    for (int64_t t = begin; t < end; ++t) {
      char* row = out + t * p.row_bytes;
      if (next < p.rows && p.indices[next] == t) {
        std::memcpy(row, y + next++ * p.y_row_stride, p.row_bytes);
      } else if (base != nullptr) {
        std::memcpy(row, base + t * p.base_row_stride, p.row_bytes);
      } else {
        std::memset(row, 0, p.row_bytes);
      }
    }
  });
}

}  // namespace sait::cpu
