// The decays of one (sequence, head) as weights of a chunk: exponentials of differences of running
// sums of log decays, taken in double and never positive.
#pragma once
#include <cmath>
#include <cstdint>

#include "linear_engine.h"

namespace longctx::cpu {

template <class T>
class DecayWeights {
 public:
  static constexpr int64_t kSize = kLinearChunk;
  // Scratch of one object, in elements of T and of double.
  static constexpr int64_t kValues = kSize * kSize + 2 * kSize;
  static constexpr int64_t kSums = kSize * kSize + kSize;

  DecayWeights(const LinearEngine<T>& engine, T* values, double* sums)
      : engine_(engine),
        pairs_(values),
        rows_(pairs_ + kSize * kSize),
        keys_(rows_ + kSize),
        sums_(sums),
        differences_(sums + kSize) {}

  // Starts on a head; `batch` and the token numbers below index the axis of log_decay.
  void begin(const LinearAttentionParams& params, int64_t batch, int64_t head, bool causal) {
    params_ = &params;
    batch_ = batch;
    head_ = head;
    causal_ = causal;
    filled_keys_ = -1;
    if (params.log_decay.per_token) return;
    sum_chunk(0, kSize);
    fill_pairs(kSize);
  }

  // A causal chunk, or one whose rows see its own keys on both sides. Reversed, its rows and keys
  // count from its last token.
  ChunkWeights<T> forward(int64_t first_token, int64_t num_keys) {
    const bool per_token = params_->log_decay.per_token;
    if (per_token) {
      sum_chunk(first_token, num_keys);
      fill_pairs(num_keys);
    }
    if (per_token || filled_keys_ != num_keys) {
      const double all = per_token ? chunk_sum_ : decay_at(0) * static_cast<double>(num_keys);
      fill(rows_, [&](int64_t i) { return sums_[i]; });
      fill(keys_, [&](int64_t j) { return j < num_keys ? all - sums_[j] : 0.0; });
      carry_ = static_cast<T>(std::exp(all));
      filled_keys_ = num_keys;
    }
    return {pairs_, causal_, rows_, keys_, carry_};
  }

  // Rows of a chunk that see only the state of all keys after it.
  ChunkWeights<T> backward(int64_t first_token, int64_t num_keys) {
    if (params_->log_decay.per_token) sum_chunk(first_token, num_keys);
    filled_keys_ = -1;
    const double last = sums_[kSize - 1];
    fill(rows_, [&](int64_t i) { return last - sums_[i]; });
    fill(keys_, [&](int64_t j) { return sums_[j]; });
    return {nullptr, false, rows_, keys_, static_cast<T>(std::exp(last))};
  }

  // Rows `distance`, distance + 1, ... tokens after the last key.
  ChunkWeights<T> beyond(int64_t distance) {
    filled_keys_ = -1;
    fill(rows_, [&](int64_t i) { return decay_at(0) * static_cast<double>(distance + i); });
    return {nullptr, false, rows_, nullptr, T(1)};
  }

  // The log decay over tokens [first, last).
  double total(int64_t first, int64_t last) const {
    if (!params_->log_decay.per_token) return decay_at(0) * static_cast<double>(last - first);
    double sum = 0;
    for (int64_t token = first; token < last; ++token) sum += decay_at(token);
    return sum;
  }

 private:
  double decay_at(int64_t token) const {
    return log_decay_at(params_->log_decay, batch_, params_->num_q_heads, head_,
                        params_->seqs.seqlen_k, token);
  }

  // Sums up to and with each token, or, reversed, up to and without: a token decays the state that
  // it meets, and backwards the one that it leaves. They stand still behind the last token.
  void sum_chunk(int64_t first_token, int64_t count) {
    const int64_t own = params_->reverse ? 0 : 1;
    chunk_sum_ = 0;
    for (int64_t i = 0; i < kSize; ++i) {
      if (!params_->log_decay.per_token) {
        sums_[i] = decay_at(0) * static_cast<double>(i + own);
        continue;
      }
      const double before = chunk_sum_;
      if (i < count) chunk_sum_ += decay_at(first_token + (own == 1 ? i : count - 1 - i));
      sums_[i] = own == 1 ? chunk_sum_ : before;
    }
  }

  void fill_pairs(int64_t count) {
    for (int64_t i = 0; i < kSize; ++i) {
      double* row = differences_ + i * kSize;
      for (int64_t j = 0; j < kSize; ++j) {
        const double difference = sums_[i] - sums_[j];
        row[j] = j <= i ? difference : -difference;
      }
    }
    const int64_t rows = causal_ ? count : kSize;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t seen = causal_ ? i + 1 : kSize;
      T* pairs = pairs_ + i * kSize;
      engine_.exponentials(differences_ + i * kSize, seen, pairs);
      for (int64_t j = seen; j < kSize; ++j) pairs[j] = 0;
    }
    for (int64_t i = rows * kSize; i < kSize * kSize; ++i) pairs_[i] = 0;
  }

  template <class At>
  void fill(T* to, const At& at) {
    for (int64_t i = 0; i < kSize; ++i) differences_[i] = at(i);
    engine_.exponentials(differences_, kSize, to);
  }

  const LinearEngine<T>& engine_;
  const LinearAttentionParams* params_ = nullptr;
  int64_t batch_ = 0;
  int64_t head_ = 0;
  bool causal_ = true;
  int64_t filled_keys_ = -1;  // rows_, keys_ and carry_ are those of a chunk of so many keys
  T carry_ = 1;
  double chunk_sum_ = 0;  // of a decay per token: all of the chunk
  T* pairs_;              // [kSize][kSize]
  T* rows_;               // [kSize]
  T* keys_;               // [kSize]
  double* sums_;          // [kSize]
  double* differences_;   // [kSize][kSize]
};

}  // namespace longctx::cpu
