// The decays of one (sequence, head) as weights of a chunk: exponentials of differences of running
// sums of log decays, which are taken in double and never positive.
#pragma once
#include "cuda/linear_items.cuh"

namespace longctx::cuda {

// In shared memory. Key j counts in row i by the decay between them, whichever comes first.
struct alignas(16) LinearWeights {
  float rows[kLinearChunk];  // the state before the chunk, in row i
  float keys[kLinearChunk];  // key j in the state behind it, in units; 0 where there is no key
  // With a decay per token: the sums up to and with each token as log2, each in two parts.
  float2 sums[kLinearChunk];
  float carry;  // the state before the chunk in the state behind it, in units
  float unit;   // 1, or with pass.key_units the power of two below the largest weight of a key
};

// The largest power of two up to x, which is not negative; between 2^-120 and 2^120.
LONGCTX_DEVICE float power_of_two(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  int exponent = static_cast<int>(bits >> 23);
  exponent = exponent < 7 ? 7 : exponent > 247 ? 247 : exponent;
  bits = static_cast<uint32_t>(exponent) << 23;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// Of a head, in shared memory.
struct alignas(16) LinearDecay {
  float powers[kLinearChunk + 1];  // constant decay: of so many tokens
  double total;                    // the log decay over the keys walked so far
};

// What row `row` and key `key` of a chunk weigh for each other.
LONGCTX_DEVICE float pair_weight(const LinearDecay& decay, int row, int key) {
  return decay.powers[row < key ? key - row : row - key];
}
LONGCTX_DEVICE float pair_weight(float2 row_sum, float2 key_sum) {
  return device::exp2_fast(-fabsf((row_sum.x - key_sum.x) + (row_sum.y - key_sum.y)));
}

// Fills the weights of one chunk after the other; one warp owns it and calls everything with all
// lanes. Lane l looks after the tokens 2 l and 2 l + 1.
class LinearWeigher {
 public:
  LONGCTX_DEVICE LinearWeigher(const LinearAttentionParams& p, const LinearPass& pass,
                               const LinearItem& item, LinearDecay& decay)
      : p_(p), pass_(pass), item_(item), decay_(decay) {}

  LONGCTX_DEVICE void begin() {
    if (!p_.log_decay.per_token) {
      const double log_decay = log_decay_at(p_.log_decay, 0, p_.num_q_heads, item_.head, 0, 0);
      for (int n = device::lane_index(); n <= kLinearChunk; n += device::kWarpSize) {
        decay_.powers[n] = expf(static_cast<float>(log_decay * n));
      }
    }
    if (device::lane_index() == 0) decay_.total = 0;
    device::sync_warp();
  }

  // Loads the decays of a chunk's tokens, which should come some time before weigh() needs them.
  LONGCTX_DEVICE void fetch(int64_t chunk) {
    if (!p_.log_decay.per_token) return;
    const int num_keys = item_.num_keys(chunk);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = 2 * device::lane_index() + i;
      const int64_t at = item_.seq.k_begin + chunk * kLinearChunk + token;
      own_[i] =
          token < num_keys
              ? static_cast<float>(log_decay_at(p_.log_decay, item_.seq.batch_index, p_.num_q_heads,
                                                item_.head, p_.seqs.seqlen_k, at))
              : 0.0f;
    }
  }

  // The weights of the chunk that was fetched.
  LONGCTX_DEVICE void weigh(int64_t chunk, LinearWeights& weights) const {
    const int num_keys = item_.num_keys(chunk);
    if (p_.log_decay.per_token) {
      weigh_tokens(num_keys, weights);
    } else if (num_keys > 0) {
      weigh_powers(num_keys, weights);
    } else {
      weigh_beyond(chunk, weights);
    }
  }

  // What a state before the walk is worth behind it.
  LONGCTX_DEVICE void write_carry() const {
    if (device::lane_index() > 0 || pass_.carries == nullptr) return;
    pass_.carries[item_.map(p_) * pass_.num_segments + item_.segment] =
        expf(static_cast<float>(decay_.total));
  }

 private:
  // Walked backwards, the first key of a chunk weighs most, perhaps little; else the last one
  // does, 1.
  LONGCTX_DEVICE float key_unit(float first_weight) const {
    return pass_.key_units && pass_.descending ? power_of_two(first_weight) : 1.0f;
  }

  LONGCTX_DEVICE void weigh_tokens(int num_keys, LinearWeights& weights) const {
    constexpr double kLog2E = 1.4426950408889634;
    const int lane = device::lane_index();
    double through = static_cast<double>(own_[0]) + own_[1];  // sum over the lanes up to this one
    for (int delta = 1; delta < device::kWarpSize; delta *= 2) {
      const double other = device::shuffle_up(through, delta);
      if (lane >= delta) through += other;
    }
    double before = device::shuffle_up(through, 1);
    if (lane == 0) before = 0;
    const double last = device::shuffle(through, device::kWarpSize - 1);
    const float unit = key_unit(expf(device::shuffle(own_[0], 0))), factor = 1.0f / unit;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = 2 * lane + i;
      const double sum = i == 0 ? before + own_[0] : through;
      const float from_begin = expf(static_cast<float>(sum));
      const float to_end = expf(static_cast<float>(last - sum));
      weights.rows[token] = pass_.descending ? to_end : from_begin;
      const float key = pass_.descending ? from_begin : to_end;
      weights.keys[token] = token < num_keys ? key * factor : 0.0f;
      const double log2_sum = sum * kLog2E;
      const float high = static_cast<float>(log2_sum);
      weights.sums[token] = {high, static_cast<float>(log2_sum - high)};
    }
    if (lane == 0) {
      weights.carry = expf(static_cast<float>(last)) * factor;
      weights.unit = unit;
      decay_.total += last;
    }
  }

  LONGCTX_DEVICE void weigh_powers(int num_keys, LinearWeights& weights) const {
    const float* powers = decay_.powers;
    const float unit = key_unit(powers[1]), factor = 1.0f / unit;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = 2 * device::lane_index() + i;
      const float to_end = token < num_keys ? powers[num_keys - 1 - token] : 0.0f;
      weights.rows[token] = pass_.descending ? to_end : powers[token + 1];
      const float key = pass_.descending ? powers[token + 1] : to_end;
      weights.keys[token] = token < num_keys ? key * factor : 0.0f;
    }
    if (device::lane_index() == 0) {
      weights.carry = powers[num_keys] * factor;
      weights.unit = unit;
      decay_.total += num_keys * log_decay_at(p_.log_decay, 0, p_.num_q_heads, item_.head, 0, 0);
    }
  }

  // Rows behind the last key, which see the state of all keys.
  LONGCTX_DEVICE void weigh_beyond(int64_t chunk, LinearWeights& weights) const {
    const double log_decay = log_decay_at(p_.log_decay, 0, p_.num_q_heads, item_.head, 0, 0);
    const int64_t distance = chunk * kLinearChunk + 1 - item_.seq.k_len;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = 2 * device::lane_index() + i;
      weights.rows[token] = expf(static_cast<float>(log_decay * (distance + token)));
      weights.keys[token] = 0.0f;
    }
    if (device::lane_index() == 0) weights.carry = weights.unit = 1.0f;
  }

  const LinearAttentionParams& p_;
  const LinearPass& pass_;
  const LinearItem& item_;
  LinearDecay& decay_;
  float own_[2] = {0.0f, 0.0f};
};

}  // namespace longctx::cuda
