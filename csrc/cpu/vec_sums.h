// The sums of vectors over their lanes, as one vector. Include after one vec_<isa>.h.
#pragma once

namespace longctx::cpu {
namespace {

// Sums each x[i] over its lanes into lane i: a round halves the vectors, and each leaves the bit
// that told its two halves apart in the lowest bit of the lane.
template <class V, int kCount = V::kLanes>
inline V sum_lanes(V (&x)[V::kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kCount / 2; ++i) {
    x[i] = zip_low(x[i], x[i + kCount / 2]) + zip_high(x[i], x[i + kCount / 2]);
  }
  if constexpr (kCount > 2) {
    return sum_lanes<V, kCount / 2>(x);
  } else {
    return x[0];
  }
}

}  // namespace
}  // namespace longctx::cpu
