// The 8-bit formats that tensors are quantised to, for both the CPU's and the GPU's kernels.
#pragma once

#include <cstdint>

namespace megalm {

// A format by its bits: kShift is what a mantissa loses, kBias what the exponent loses, kLargest the greatest finite
// value, kStep the distance of its subnormals and kAlign the number whose fp32 neighbours are kStep apart.
struct E4M3 {
  static constexpr int kShift = 20;
  static constexpr uint32_t kBias = 120, kLargestBits = 0x43e00000u, kSmallestBits = 0x3c800000u;
  static constexpr float kLargest = 448.f, kAlign = 16384.f, kStep = 0x1p-9f;
  static constexpr uint32_t kAlignBits = 0x46800000u, kFirstSpecial = 0x7f;
};
struct E5M2 {
  static constexpr int kShift = 21;
  static constexpr uint32_t kBias = 112, kLargestBits = 0x47600000u, kSmallestBits = 0x38800000u;
  static constexpr float kLargest = 57344.f, kAlign = 128.f, kStep = 0x1p-16f;
  static constexpr uint32_t kAlignBits = 0x43000000u, kFirstSpecial = 0x7c;
};

}  // namespace megalm
