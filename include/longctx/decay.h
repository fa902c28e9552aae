// How the decay of linear attention is read. Weights are exponentials of sums of log decays, which
// are never positive, so that nothing overflows.
#pragma once
#include <cstdint>

#include "longctx/config.h"
#include "longctx/params.h"

namespace longctx {

// Tokens of a chunk: attention inside it goes by products of rows, across it by the state.
constexpr int kLinearChunk = 64;

// The log decay at a token, within [-800, 0]: exp(-800) is 0 in every dtype, so the lower bound
// changes no weight and keeps differences of sums defined where -inf was given. NaN stays NaN.
LONGCTX_HD inline double log_decay_at(const LogDecay& decay, int64_t batch, int64_t num_heads,
                                      int64_t head, int64_t seqlen, int64_t token) {
  if (decay.data == nullptr) return 0.0;
  const int64_t index = decay.per_token ? (batch * num_heads + head) * seqlen + token : head;
  const double value = decay.is_double ? static_cast<const double*>(decay.data)[index]
                                       : static_cast<const float*>(decay.data)[index];
  constexpr double kVanished = -800.0;
  return value < kVanished ? kVanished : (value > 0.0 ? 0.0 : value);
}

}  // namespace longctx
