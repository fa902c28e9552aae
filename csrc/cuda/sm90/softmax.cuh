// The online softmax of a consumer warpgroup, on accumulators of WGMMA: of each row of 64 a quad
// of lanes holds every fourth pair of columns, and each thread holds parts of two rows.
#pragma once
#include "cuda/sm90/tile.cuh"
#include "device/mma.cuh"

namespace longctx::cuda::sm90 {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// From q . k to the exponent in base 2. Without a softcap, and for a positive scale, the product
// is left as it is and `multiplier` brought in by the exponential.
struct ScoreScale {
  float multiplier = 1.0f;
  float scale = 1.0f;      // softmax_scale * log2(e), or softmax_scale / softcap
  float cap_log2 = 0.0f;   // softcap * log2(e); 0: none
  bool transforms = false;

  explicit ScoreScale(const AttentionParams& p) {
    const double scale_log2 = p.softmax_scale * 1.4426950408889634;
    transforms = p.softcap > 0 || !(p.softmax_scale > 0);
    if (!transforms) {
      multiplier = static_cast<float>(scale_log2);
    } else if (p.softcap > 0) {
      scale = static_cast<float>(p.softmax_scale / p.softcap);
      cap_log2 = static_cast<float>(p.softcap * 1.4426950408889634);
    } else {
      scale = static_cast<float>(scale_log2);
    }
  }

  LONGCTX_DEVICE float transform(float s) const {
    if (!(cap_log2 > 0)) return s * scale;
    // tanh(x) = 1 - 2 / (e^2x + 1)
    const float power = device::exp2_fast(s * scale * (2 * kLog2E));
    return fmaf(-2.0f * cap_log2, device::reciprocal_fast(power + 1.0f), cap_log2);
  }
};

// What a thread knows of its two rows; sums are its own columns' until finish().
struct RowStatistics {
  float top[2] = {-INFINITY, -INFINITY};  // largest score, before `multiplier`
  float sum[2] = {0.0f, 0.0f};            // of 2^(score - top)

  // Turns scores into probabilities relative to the new maximum; factor[i] is what sums and
  // products relative to the old one are worth.
  template <int n>
  LONGCTX_DEVICE void update(float (&s)[n], float multiplier, float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float highest = s[2 * i];
#pragma unroll
      for (int e = 0; e < n; e += 4) {
        highest = fmaxf(highest, fmaxf(s[e + 2 * i], s[e + 2 * i + 1]));
      }
      highest = fmaxf(highest, device::shuffle_xor(highest, 1));
      highest = fmaxf(highest, device::shuffle_xor(highest, 2));
      highest = fmaxf(highest, top[i]);
      // -inf, of a row that has seen no key, cannot be subtracted.
      const float reference = highest == -INFINITY ? 0.0f : highest * multiplier;
      factor[i] = device::exp2_fast(fmaf(top[i], multiplier, -reference));
      top[i] = highest;
      float tile_sum = 0.0f;
#pragma unroll
      for (int e = 0; e < n; e += 4) {
        float* const pair = &s[e + 2 * i];
        pair[0] = device::exp2_fast(fmaf(pair[0], multiplier, -reference));
        pair[1] = device::exp2_fast(fmaf(pair[1], multiplier, -reference));
        tile_sum += pair[0] + pair[1];
      }
      sum[i] = fmaf(sum[i], factor[i], tile_sum);
    }
  }

  LONGCTX_DEVICE void finish() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] += device::shuffle_xor(sum[i], 1);
      sum[i] += device::shuffle_xor(sum[i], 2);
    }
  }
};

// A row's mask with one comparison an interval.
class FastRowMask {
 public:
  LONGCTX_DEVICE explicit FastRowMask(const RowMask32& mask)
      : window_(mask.window),
        sinks_(mask.sinks),
        first_range_(mask.ranges[0]),
        second_range_(mask.ranges[1]) {}
  LONGCTX_DEVICE bool visible(int32_t key) const {
    return (window_.contains(key) | sinks_.contains(key)) &
           (first_range_.contains(key) | second_range_.contains(key));
  }

 private:
  struct Span {
    uint32_t begin, length;
    LONGCTX_DEVICE explicit Span(const Interval32& i)
        : begin(static_cast<uint32_t>(i.begin)),
          length(i.begin < i.end ? static_cast<uint32_t>(i.end) - begin : 0u) {}
    LONGCTX_DEVICE bool contains(int32_t key) const {
      return static_cast<uint32_t>(key) - begin < length;
    }
  };
  Span window_, sinks_, first_range_, second_range_;
};

// Sets those of a row's scores that it does not see to -inf: every second pair of s. `positions`
// are those from the thread's first column on.
template <int n>
LONGCTX_DEVICE void mask_row(float (&s)[n], int i, const int32_t* positions,
                             const FastRowMask& row) {
#pragma unroll
  for (int e = 0; e < n; e += 4) {
    const int2 pair = *reinterpret_cast<const int2*>(positions + 2 * e);
    if (!row.visible(pair.x)) s[e + 2 * i] = -INFINITY;
    if (!row.visible(pair.y)) s[e + 2 * i + 1] = -INFINITY;
  }
}

// p as the operands [64, 16] of n / 8 products.
template <class T, int n>
LONGCTX_DEVICE void pack_probabilities(const float (&p)[n], uint32_t (&packed)[n / 8][4]) {
#pragma unroll
  for (int e = 0; e < n; e += 2) {
    packed[e / 8][e % 8 / 2] = device::pack_pair(T(), p[e], p[e + 1]);
  }
}

}  // namespace longctx::cuda::sm90
