// A row of scores as order keys, 16 bytes of scores at a time, and what each of them weighs.
#pragma once
#include "cuda/columns.cuh"
#include "device/thread.cuh"
#include "longctx/float_order.h"
#include "longctx/logit_mass.h"
#include "longctx/score_rows.h"

namespace longctx::cuda {

// Of each row the best, those in the first and last places included at most p.k, whose key is at
// least `floor`; with `cumulative` no more than hold the share `value` of the row's softmax.
struct SelectRule {
  TopKSelectParams p;
  uint32_t floor = 0;
  bool cumulative = false;
  float value = 0.0f;
  bool aligned = false;  // every row starts at a multiple of 16 bytes
};

LONGCTX_DEVICE uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }
LONGCTX_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// The score of a key that is not 0; of both zeros, +0.
LONGCTX_HD inline float score_of(uint32_t key, DType dtype) {
  uint32_t bits = key_bits(key, float_format(dtype));
  if (dtype == DType::kFloat16) {
    __half_raw raw;
    raw.x = static_cast<uint16_t>(bits);
    return __half2float(__half(raw));
  }
  if (dtype == DType::kBFloat16) bits <<= 16;
  float score;
  memcpy(&score, &bits, sizeof(score));
  return score;
}

// exp(score - best) as an integer; see logit_mass().
struct KeyMass {
  DType dtype = DType::kFloat32;
  float best = 0.0f;
  int shift = 0;
  LONGCTX_DEVICE int64_t operator()(uint32_t key) const {
    return key == 0 ? 0 : logit_mass(score_of(key, dtype), best, shift);
  }
};

LONGCTX_DEVICE KeyMass key_mass(const SelectRule& rule, uint32_t best_key, int64_t length) {
  const DType dtype = rule.p.scores.dtype;
  return {dtype, best_key == 0 ? 0.0f : score_of(best_key, dtype), logit_mass_shift(length)};
}

// Rows have less than 2^31 scores, so that unsigned indices can run past the end.
template <class Bits>
class RowKeys {
 public:
  static constexpr uint32_t kGroup = 16 / sizeof(Bits);
  static constexpr uint32_t kChunk = kGroup * device::kWarpSize;  // what a warp loads at a time
  using Group = Columns<Bits, static_cast<int>(kGroup)>;

  LONGCTX_DEVICE RowKeys(const SelectRule& rule, int64_t row)
      : scores_(static_cast<const Bits*>(rule.p.scores.data) + row_offset(rule.p.scores, row)),
        format_(float_format(rule.p.scores.dtype)),
        aligned_(rule.aligned) {
    const int64_t length = row_length(rule.p.scores, row);
    const RowParts parts = row_parts(length, rule.p.num_first, rule.p.num_last, rule.p.k);
    first = static_cast<uint32_t>(parts.first);
    last = static_cast<uint32_t>(parts.last);
    this->length = static_cast<uint32_t>(length);
    places = static_cast<uint32_t>(parts.places);
  }

  // From now on keys are read from `staged` [length, rounded up to a group].
  LONGCTX_DEVICE void use(const Bits* staged) { staged_ = staged; }

  // The group of scores from i on, a multiple of kGroup; anything where none exist.
  LONGCTX_DEVICE Group load(uint32_t i) const {
    if (staged_ != nullptr) return *reinterpret_cast<const Group*>(staged_ + i);
    if (aligned_ && i + kGroup <= length) return *reinterpret_cast<const Group*>(scores_ + i);
    Group group;
#pragma unroll
    for (uint32_t e = 0; e < kGroup; ++e) group.values[e] = i + e < length ? scores_[i + e] : 0;
    return group;
  }
  LONGCTX_DEVICE uint32_t key(Bits loaded) const {
    return staged_ != nullptr ? loaded : order_key(loaded, format_);
  }
  LONGCTX_DEVICE uint32_t key_at(uint32_t i) const {
    return key(staged_ != nullptr ? staged_[i] : scores_[i]);
  }
  LONGCTX_DEVICE bool competes(uint32_t i) const { return i >= first && i < last; }

  // Those from `first` to `last` compete for `places`, the others below `length` are forced.
  uint32_t first, last, length, places;

 private:
  const Bits* scores_;
  const Bits* staged_ = nullptr;
  FloatFormat format_;
  bool aligned_;
};

// The part of a range of a row that this warp looks at: neighbouring chunks. The first loads are
// under way as soon as it is made.
template <class Bits>
class KeyRun {
 public:
  static constexpr uint32_t kChunk = RowKeys<Bits>::kChunk;

  // Of [begin, end), where begin is a multiple of a chunk.
  LONGCTX_DEVICE KeyRun(const RowKeys<Bits>& keys, uint32_t begin, uint32_t end) : keys_(keys) {
    const uint32_t num_warps = device::num_threads() / device::kWarpSize;
    const uint32_t chunks = (end - begin + kChunk - 1) / kChunk;
    const uint32_t own = (chunks + num_warps - 1) / num_warps * kChunk;
    const uint32_t before = begin + device::thread_index() / device::kWarpSize * own;
    begin_ = before < end ? before : end;
    end_ = begin_ + own < end ? begin_ + own : end;
    load(begin_, loaded_);
  }

  // visit(index, key) for what this lane has, in ascending order, and for indices at or beyond the
  // row's length.
  template <class Visit>
  LONGCTX_DEVICE void for_each(const Visit& visit) const {
    for_each_group([&](uint32_t i, const uint32_t (&keys)[kGroup]) {
#pragma unroll
      for (uint32_t e = 0; e < kGroup; ++e) visit(i + e, keys[e]);
    });
  }

  // visit(index of the first, keys), called by whole warps.
  template <class Visit>
  LONGCTX_DEVICE void for_each_group(const Visit& visit) const {
    Batch batch = loaded_;
    for (uint32_t chunk = begin_; chunk < end_;) {
#pragma unroll
      for (uint32_t b = 0; b < kBatch; ++b) {
        if (chunk + b * kChunk >= end_) break;
        const uint32_t i = lane_group(chunk + b * kChunk);
        uint32_t keys[kGroup];
#pragma unroll
        for (uint32_t e = 0; e < kGroup; ++e) keys[e] = keys_.key(batch.groups[b].values[e]);
        visit(i, keys);
      }
      chunk += kBatch * kChunk;
      if (chunk < end_) load(chunk, batch);
    }
  }

 private:
  static constexpr uint32_t kGroup = RowKeys<Bits>::kGroup;
  static constexpr uint32_t kBatch = 4;  // chunks under way
  struct Batch {
    typename RowKeys<Bits>::Group groups[kBatch];
  };

  static LONGCTX_DEVICE uint32_t lane_group(uint32_t chunk) {
    return chunk + device::lane_index() * kGroup;
  }
  LONGCTX_DEVICE void load(uint32_t chunk, Batch& batch) const {
#pragma unroll
    for (uint32_t b = 0; b < kBatch; ++b) {
      const uint32_t i = lane_group(chunk + b * kChunk);
      batch.groups[b] = i < end_ ? keys_.load(i) : typename RowKeys<Bits>::Group{};
    }
  }

  const RowKeys<Bits>& keys_;
  uint32_t begin_, end_;
  Batch loaded_;
};

}  // namespace longctx::cuda
