// The search for the cut of a row: a radix descent over its keys, a digit a pass. A pass sums
// entries, and for the cumulative rule their masses, by digit; 32 digits at a time are summed once
// more, so that who puts the sums of several blocks of threads together reads few of them.
#pragma once
#include "cuda/block_reduce.cuh"
#include "cuda/row_keys.cuh"
#include "cuda/wide_sums.cuh"
#include "longctx/score_order.h"

namespace longctx::cuda {

constexpr int kMaxDigitBits = 11;
constexpr int kCluster = device::kWarpSize;  // neighbouring digits that are summed once more
constexpr int kMaxClusters = (1 << kMaxDigitBits) / kCluster;

struct KeyDigit {
  int shift = 0;
  int bits = 0;
  LONGCTX_DEVICE int num_clusters() const { return (1 << bits) / kCluster; }
  LONGCTX_DEVICE uint32_t of(uint32_t key) const { return key >> shift & ((1u << bits) - 1); }
};

// From the highest bits down; each of `digit_bits` but the last, which has what is left.
LONGCTX_DEVICE KeyDigit digit_of_pass(int key_bits, int digit_bits, int pass) {
  const int high = key_bits - pass * digit_bits;
  const int shift = high > digit_bits ? high - digit_bits : 0;
  return {shift, high - shift};
}

struct Amount {
  int64_t count = 0;
  int64_t mass = 0;
};

// In shared memory; of the sums by cluster, the first are used.
struct CountSums {
  int32_t of_digit[1 << kMaxDigitBits];
  int32_t of_cluster[kMaxClusters];
};
struct MassSums {
  WideSums<1 << kMaxDigitBits> of_digit;
  int64_t of_cluster[kMaxClusters];
};

// Entries above `key`, and the first `num_ties` at it.
struct KeyCut {
  uint32_t key = 0xffffffffu;
  uint32_t num_ties = 0;
};

// The smallest prefix of the order that has `count` entries or the mass `mass`, whichever comes
// first. The key at which it ends starts with `prefix`, and `count` and `mass` are what is wanted
// of the keys that do.
struct KeySearch {
  enum Outcome : int32_t { kOpen, kNothing, kEverything };
  int64_t count = 0;
  int64_t mass = INT64_MAX;
  uint32_t prefix = 0;
  uint32_t best = 0;  // the highest key of the row, for the cumulative rule
  Outcome outcome = kOpen;

  LONGCTX_DEVICE explicit KeySearch(uint32_t places, uint32_t best_key = 0)
      : count(places), best(best_key), outcome(places > 0 ? kOpen : kNothing) {}

  LONGCTX_DEVICE bool has_share() const { return mass != INT64_MAX; }

  // Whether a key has the prefix, which is of the bits above the digit.
  LONGCTX_DEVICE bool looks_at(uint32_t key, const KeyDigit& digit) const {
    return static_cast<uint64_t>(key) >> (digit.shift + digit.bits) == prefix;
  }
  // Whether a key is chosen whatever this digit and the later ones turn out to be.
  LONGCTX_DEVICE bool is_better(uint32_t key, const KeyDigit& digit) const {
    if (outcome != kOpen) return outcome == kEverything;
    return static_cast<uint64_t>(key) >> (digit.shift + digit.bits) > prefix;
  }

  // The cumulative rule, given the mass of the row and of its forced scores.
  LONGCTX_DEVICE void want_share(float value, int64_t total, int64_t forced) {
    mass = mass_target(value, total) - forced;
    if (mass <= 0) outcome = kNothing;
  }

  // The highest of `num` entries, at most 2 a lane, through which those above it reach what is
  // wanted, which becomes what this one must still give; -1 if they fall short. A whole warp calls
  // this.
  template <class Amounts>
  LONGCTX_DEVICE int descend(const Amounts& amounts, int num) {
    const int highest = num - 1 - 2 * device::lane_index();
    const Amount upper = highest >= 0 ? amounts(highest) : Amount();
    const Amount lower = highest >= 1 ? amounts(highest - 1) : Amount();
    Amount through{scan_warp(upper.count + lower.count)};
    if (has_share()) through.mass = scan_warp(upper.mass + lower.mass);
    const uint32_t reached = device::ballot(through.count >= count || through.mass >= mass);
    const int lane = reached != 0 ? device::lowest_bit(reached) : device::kWarpSize - 1;
    int64_t left_count = count - (through.count - upper.count - lower.count);
    int64_t left_mass = mass - (through.mass - upper.mass - lower.mass);
    int entry = highest;
    if (upper.count < left_count && upper.mass < left_mass) {
      --entry;
      left_count -= upper.count;
      left_mass -= upper.mass;
    }
    if (reached == 0) {
      left_count -= lower.count;
      entry = -1;
    }
    count = device::shuffle(left_count, lane);
    mass = device::shuffle(left_mass, lane);
    return device::shuffle(entry, lane);
  }

  // Goes on by a digit, if the search is still open, given the sums of the clusters; then
  // fine(cluster) gives those of its digits. All threads of a block call this.
  template <class Coarse, class Fine>
  LONGCTX_DEVICE void take_digit(const KeyDigit& digit, const Coarse& coarse, const Fine& fine) {
    if (outcome != kOpen) return;
    const int cluster = descend(coarse, digit.num_clusters());
    if (cluster < 0) {
      outcome = kEverything;
      return;
    }
    const int within = descend(fine(cluster), kCluster);
    prefix = prefix << digit.bits | static_cast<uint32_t>(cluster * kCluster + within);
  }

  // At the end; keys are at least `floor`, which is positive where there can be too few of them.
  LONGCTX_DEVICE KeyCut cut(uint32_t floor, const KeyMass& weight) const {
    if (outcome == kNothing) return {};
    if (outcome == kEverything) return {floor - 1, 0};
    int64_t ties = count;
    if (has_share()) {
      const int64_t each = weight(prefix);
      if (each > 0 && (mass - 1) / each + 1 < ties) ties = (mass - 1) / each + 1;
    }
    return {prefix, static_cast<uint32_t>(ties)};
  }
  // How many of `places` a cut fills.
  LONGCTX_DEVICE uint32_t num_chosen(uint32_t places, const KeyCut& cut) const {
    return places - static_cast<uint32_t>(count) + cut.num_ties;
  }
};

}  // namespace longctx::cuda
