// The softmax of one warp's rows of scores, as the tensor cores leave them: accumulator
// [row tile][column tile][4] of 16 x 8 products. A lane sees two rows of a row tile, `half` 0 and
// 1, and the four lanes of a quad share them.
#pragma once
#include "cuda/fragments.cuh"
#include "cuda/softcap.cuh"
#include "cuda/visit.cuh"
#include "device/mma.cuh"

namespace longctx::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Scores are powers of two here: a weight is 2^(s - reference).
template <int kRowTiles>
struct RowStates {
  float reference[kRowTiles][2];  // maximum of s when last raised; -inf: nothing seen. Quad-wide
  float sum[kRowTiles][2];        // of the weights in this lane's columns
};

// -inf, the reference of a row that has seen nothing, cannot be subtracted.
LONGCTX_DEVICE float finite(float reference) { return fmaxf(reference, -FLT_MAX); }

// What becomes of a score q . k before the mask.
struct ScoreScale {
  float scale_log2 = 1;  // softmax_scale * log2(e)
  float inner = 0;       // softmax_scale / softcap, where there is a softcap
  float cap_log2 = 0;    // softcap * log2(e); 0: none
  // The row maximum of scaled scores is the scaled maximum: a full tile needs one product a score.
  LONGCTX_DEVICE bool monotone() const { return cap_log2 == 0 && scale_log2 > 0; }
  LONGCTX_DEVICE float linear(float s) const { return s * scale_log2; }
  LONGCTX_DEVICE float capped(float s) const { return cap_log2 * tanh_accurate(s * inner); }
  LONGCTX_DEVICE float apply(float s) const { return cap_log2 == 0 ? linear(s) : capped(s); }
};

inline ScoreScale score_scale(double softmax_scale, double softcap) {
  constexpr double kDoubleLog2E = 1.4426950408889634;
  ScoreScale scale;
  scale.scale_log2 = static_cast<float>(softmax_scale * kDoubleLog2E);
  if (softcap > 0) {
    scale.inner = static_cast<float>(softmax_scale / softcap);
    scale.cap_log2 = static_cast<float>(softcap * kDoubleLog2E);
  }
  return scale;
}

// Scale and softcap, in place.
template <int kRowTiles, int kColTiles>
LONGCTX_DEVICE void scale_scores(const ScoreScale& scale, float (&s)[kRowTiles][kColTiles][4]) {
  const auto apply = [&s](const auto& f) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kColTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] = f(s[m][n][i]);
      }
    }
  };
  if (scale.cap_log2 == 0) {
    apply([&](float score) { return scale.linear(score); });
  } else {
    apply([&](float score) { return scale.capped(score); });
  }
}

// Mask, in place. Lane r brings the slots that row r % (16 * kRowTiles) of the warp sees.
template <int kRowTiles, int kColTiles>
LONGCTX_DEVICE void mask_scores(uint64_t seen, float (&s)[kRowTiles][kColTiles][4]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint64_t slots = device::shuffle(seen, own_row(m, half)) >> own_column(0);
#pragma unroll
      for (int n = 0; n < kColTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if ((slots >> (8 * n + i) & 1) == 0) s[m][n][2 * half + i] = -INFINITY;
        }
      }
    }
  }
}

// Raises the references to the rows' maxima and takes what was summed relative to the old ones
// along.
template <int kRowTiles, int kOutTiles>
LONGCTX_DEVICE void raise_references(const float (&top)[kRowTiles][2], RowStates<kRowTiles>& states,
                                     float (&acc)[kRowTiles][kOutTiles][4]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float old = states.reference[m][half];
      const float raised = fmaxf(old, quad_max(top[m][half]));
      const float factor = device::exp2_fast(old - finite(raised));
      states.reference[m][half] = raised;
      states.sum[m][half] *= factor;
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n) {
        acc[m][n][2 * half] *= factor;
        acc[m][n][2 * half + 1] *= factor;
      }
    }
  }
}

// Turns s into weights 2^(s * factor - reference), rounded in pairs: what is the left operand of
// the next product. The references follow the rows' maxima only when those have grown by kSlack:
// weights above 1 lose nothing, and rescaling becomes rare.
constexpr float kSlack = 8;
template <class T, int kRowTiles, int kColTiles, int kOutTiles>
LONGCTX_DEVICE void update_softmax(float factor, const float (&s)[kRowTiles][kColTiles][4],
                                   RowStates<kRowTiles>& states,
                                   float (&acc)[kRowTiles][kOutTiles][4],
                                   uint32_t (&p)[kRowTiles][kColTiles / 2][4]) {
  float top[kRowTiles][2];
  bool grown = false;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float own = -INFINITY;
#pragma unroll
      for (int n = 0; n < kColTiles; ++n) {
        own = fmaxf(own, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
      }
      top[m][half] = own * factor;
      grown |= top[m][half] > states.reference[m][half] + kSlack;
    }
  }
  if (device::ballot(grown) != 0) raise_references(top, states, acc);
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float offset = -finite(states.reference[m][half]);
      // Summed apart first: one long chain of additions would lose a digit on thousands of keys.
      float tile_sum = 0;
#pragma unroll
      for (int n = 0; n < kColTiles; ++n) {
        const float* pair = &s[m][n][2 * half];
        const float low = device::exp2_fast(fmaf(pair[0], factor, offset));
        const float high = device::exp2_fast(fmaf(pair[1], factor, offset));
        tile_sum += low + high;
        p[m][n / 2][n % 2 * 2 + half] = device::pack_pair(T(), low, high);
      }
      states.sum[m][half] += tile_sum;
    }
  }
}

// What a row ends with.
struct RowResult {
  float factor;  // of the accumulated values
  float lse;     // natural log
};

// `reference` is a natural logarithm, `sum` the row's. `sink` is one more logit without a value,
// -inf for none; lse leaves it out.
LONGCTX_DEVICE RowResult finish_row(float reference, float sum, float sink) {
  if (sum == 0) return {0, -INFINITY};
  // The sink joins the denominator; both are taken relative to the larger of the two.
  const float top = fmaxf(sink, reference);
  const float scale = expf(reference - top);
  return {scale / (sum * scale + expf(sink - top)), reference + logf(sum)};
}

}  // namespace longctx::cuda
