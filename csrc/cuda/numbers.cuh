// Numbers of a row on their way between memory and registers, which hold float32 whatever the rows are in.
#pragma once

#include "instructions.cuh"

namespace sait::cuda {

SAIT_DEVICE float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
SAIT_DEVICE float widened(__half x) { return __half2float(x); }
SAIT_DEVICE void round_to(__nv_bfloat16& result, float x) { result = __float2bfloat16_rn(x); }
SAIT_DEVICE void round_to(__half& result, float x) { result = __float2half_rn(x); }

// kWidth numbers from an address that 16 bytes divide, or a single one.
template <int kWidth>
SAIT_DEVICE void load(float (&values)[kWidth], const float* from) {
  if constexpr (kWidth == 1) {
    values[0] = *from;
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
    }
  }
}
template <int kWidth, typename T>
SAIT_DEVICE void load(float (&values)[kWidth], const T* from) {
  if constexpr (kWidth == 1) {
    values[0] = widened(*from);
  } else {
    static_assert(kWidth == 8);
    const uint4 words = *reinterpret_cast<const uint4*>(from);
    const float2 pairs[] = {unpack(words.x, T()), unpack(words.y, T()), unpack(words.z, T()), unpack(words.w, T())};
#pragma unroll
    for (int i = 0; i < 4; ++i) values[2 * i] = pairs[i].x, values[2 * i + 1] = pairs[i].y;
  }
}

// Writes them rounded, and leaves them as they were written.
template <int kWidth>
SAIT_DEVICE void store(float* to, float (&values)[kWidth]) {
  if constexpr (kWidth == 1) {
    *to = values[0];
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; i += 4) {
      *reinterpret_cast<float4*>(to + i) = make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
    }
  }
}
template <int kWidth, typename T>
SAIT_DEVICE void store(T* to, float (&values)[kWidth]) {
  if constexpr (kWidth == 1) {
    T rounded;
    round_to(rounded, values[0]);
    *to = rounded;
    values[0] = widened(rounded);
  } else {
    uint32_t words[kWidth / 2];
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) {
      words[i] = pack(values[2 * i], values[2 * i + 1], T());
      const float2 pair = unpack(words[i], T());
      values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
    }
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

}  // namespace sait::cuda
