// The online softmax of a consumer warpgroup, on accumulators of WGMMA: of each row of 64 a quad
// of lanes holds every fourth pair of columns, and each thread holds parts of two rows.
#pragma once
#include "cuda/online_softmax.cuh"

namespace longctx::cuda::sm90 {

// A row's mask with one comparison an interval.
class SpanMask {
 public:
  LONGCTX_DEVICE explicit SpanMask(const RowMask32& mask)
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

// Sets the scores of the thread's row i (0 or 1) that it does not see to -inf. `positions` are
// those from the thread's first column on.
template <int n>
LONGCTX_DEVICE void mask_row(float (&s)[n], int i, const int32_t* positions, const SpanMask& row) {
#pragma unroll
  for (int e = 0; e < n; e += 4) {
    const int2 pair = *reinterpret_cast<const int2*>(positions + 2 * e);
    if (!row.visible(pair.x)) s[e + 2 * i] = -INFINITY;
    if (!row.visible(pair.y)) s[e + 2 * i + 1] = -INFINITY;
  }
}

// What a thread knows of its two rows. Scores are powers of two: a weight is 2^(s - reference).
struct RowPair {
  float reference[2] = {-INFINITY, -INFINITY};  // -inf: nothing seen
  float sum[2] = {0.0f, 0.0f};                  // of the weights in this thread's columns

  // Turns s into weights 2^(s * scale - reference). The references follow the rows' maxima only
  // when those have grown by kSlack; whether they have. factor[i] is then what products with
  // earlier weights of row i are worth.
  template <int n>
  LONGCTX_DEVICE bool update(float (&s)[n], float scale, float (&factor)[2]) {
    float top[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i] = s[2 * i];
#pragma unroll
      for (int e = 0; e < n; e += 4) top[i] = fmaxf(top[i], fmaxf(s[e + 2 * i], s[e + 2 * i + 1]));
      top[i] *= scale;
    }
    const bool grown = top[0] > reference[0] + kSlack || top[1] > reference[1] + kSlack;
    const bool rescales = device::ballot(grown) != 0;
    if (rescales) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float raised = fmaxf(reference[i], quad_max(top[i]));
        factor[i] = device::exp2_fast(reference[i] - finite(raised));
        reference[i] = raised;
        sum[i] *= factor[i];
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float offset = -finite(reference[i]);
      // Summed apart first: one long chain of additions would lose a digit on thousands of keys.
      float tile_sum = 0.0f;
#pragma unroll
      for (int e = 0; e < n; e += 4) {
        float* const pair = &s[e + 2 * i];
        pair[0] = device::exp2_fast(fmaf(pair[0], scale, offset));
        pair[1] = device::exp2_fast(fmaf(pair[1], scale, offset));
        tile_sum += pair[0] + pair[1];
      }
      sum[i] += tile_sum;
    }
    return rescales;
  }
};

// p as the operands [64, 16] of n / 8 products.
template <class T, int n>
LONGCTX_DEVICE void pack_weights(const float (&p)[n], uint32_t (&packed)[n / 8][4]) {
#pragma unroll
  for (int e = 0; e < n; e += 2) {
    packed[e / 8][e % 8 / 2] = device::pack_pair(T(), p[e], p[e + 1]);
  }
}

}  // namespace longctx::cuda::sm90
