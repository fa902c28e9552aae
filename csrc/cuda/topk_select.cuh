// The indices of the best scores of a row, ascending: a radix descent finds the cut, exactly, ties
// by index; then whatever is above it is written where the number of those before it says. Nothing
// is sorted. Alabi et al., "Fast k-selection algorithms for graphics processing units" (2012).
// A row whose keys fit shared memory is one block's. A longer one is cut into slices, a block of
// threads each, and every step is a launch of its own (topk_slices.cuh).
#pragma once
#include "cuda/key_search.cuh"

namespace longctx::cuda {

constexpr int kMaxRowThreads = 512;

struct TopKShared {
  BlockSlots slots;
  CountSums counts;
  MassSums masses;  // only with `cumulative`; then keys, if any
  static constexpr int64_t bytes(bool cumulative) {
    return static_cast<int64_t>(sizeof(TopKShared) - (cumulative ? 0 : sizeof(MassSums)));
  }
};
static_assert(sizeof(TopKShared) % 16 == 0 && sizeof(MassSums) % 16 == 0, "keys follow");

// The sums as a search reads them.
struct ClusterSums {
  const TopKShared& shared;
  bool cumulative;
  LONGCTX_DEVICE Amount operator()(int cluster) const {
    return {shared.counts.of_cluster[cluster],
            cumulative ? shared.masses.of_cluster[cluster] : int64_t{0}};
  }
};
struct DigitSums {
  const TopKShared& shared;
  bool cumulative;
  int first = 0;
  LONGCTX_DEVICE Amount operator()(int digit) const {
    return {shared.counts.of_digit[first + digit],
            cumulative ? shared.masses.of_digit[first + digit] : int64_t{0}};
  }
};

// Whole warps call this.
LONGCTX_DEVICE int64_t mass_of_clusters(const TopKShared& shared, const KeyDigit& digit) {
  int64_t own = 0;
  for (int c = device::lane_index(); c < digit.num_clusters(); c += device::kWarpSize) {
    own += shared.masses.of_cluster[c];
  }
  return reduce_warp(own, Sum());
}

// Sums the competing entries of a run that the search looks at by their digit, over the block;
// complete when it returns. Returns how many of this lane's entries are chosen whatever the digit.
template <class Bits>
LONGCTX_DEVICE int64_t sum_by_digit(const SelectRule& rule, const RowKeys<Bits>& keys,
                                    const KeyRun<Bits>& run, const KeySearch& search,
                                    const KeyDigit& digit, const KeyMass& weight,
                                    TopKShared& shared) {
  const int num_bins = 1 << digit.bits;
  for (int bin = device::thread_index(); bin < num_bins; bin += device::num_threads()) {
    shared.counts.of_digit[bin] = 0;
  }
  if (rule.cumulative) shared.masses.of_digit.clear(num_bins);
  device::sync_threads();

  int64_t num_better = 0;
  run.for_each([&](uint32_t i, uint32_t key) {
    if (key < rule.floor || !keys.competes(i)) return;
    num_better += search.is_better(key, digit);
    if (!search.looks_at(key, digit)) return;
    device::atomic_add_shared(&shared.counts.of_digit[digit.of(key)], 1);
    if (rule.cumulative) shared.masses.of_digit.add(digit.of(key), weight(key));
  });
  device::sync_threads();

  const int num_warps = device::num_threads() / device::kWarpSize;
  for (int cluster = device::thread_index() / device::kWarpSize; cluster < digit.num_clusters();
       cluster += num_warps) {
    const int bin = cluster * kCluster + device::lane_index();
    const int64_t count = reduce_warp(shared.counts.of_digit[bin], Sum());
    if (device::lane_index() == 0) {
      shared.counts.of_cluster[cluster] = static_cast<int32_t>(count);
    }
    if (!rule.cumulative) continue;
    const int64_t mass = reduce_warp(shared.masses.of_digit[bin], Sum());
    if (device::lane_index() == 0) shared.masses.of_cluster[cluster] = mass;
  }
  device::sync_threads();
  return num_better;
}

// The mass of the forced scores in [begin, end), over the block.
template <class Bits>
LONGCTX_DEVICE int64_t forced_mass(const RowKeys<Bits>& keys, uint32_t begin, uint32_t end,
                                   const KeyMass& weight, BlockSlots& slots) {
  int64_t own = 0;
  const auto add = [&](uint32_t from, uint32_t to) {
    for (uint32_t i = from + device::thread_index(); i < to; i += device::num_threads()) {
      own += weight(keys.key_at(i));
    }
  };
  add(begin, smaller(end, keys.first));
  add(larger(begin, keys.last), smaller(end, keys.length));
  return reduce_block(own, Sum(), slots);
}

// The highest key of a run, over the block.
template <class Bits>
LONGCTX_DEVICE uint32_t highest_key(const RowKeys<Bits>& keys, const KeyRun<Bits>& run,
                                    BlockSlots& slots) {
  uint32_t own = 0;
  run.for_each([&](uint32_t i, uint32_t key) { own = i < keys.length ? larger(key, own) : own; });
  return static_cast<uint32_t>(reduce_block(own, Maximum(), slots));
}

// What of a row one of several blocks of threads writes.
struct WrittenSlice {
  uint32_t begin, end;
  int64_t number;
  int64_t num_slices;
  int64_t num_better;  // above the cut before the slice
  int64_t num_tied;    // at the cut before the slice
};

// The forced and the chosen indices of the slice, whose run this is, and its share of the tail.
template <class Bits>
LONGCTX_DEVICE void write_chosen(const SelectRule& rule, int64_t row, const RowKeys<Bits>& keys,
                                 const KeyRun<Bits>& run, const KeyCut& cut, uint32_t num_chosen,
                                 const WrittenSlice& slice, BlockSlots& slots) {
  constexpr uint32_t kGroup = RowKeys<Bits>::kGroup;
  int32_t* const out = rule.p.indices + row * rule.p.k;
  const auto count_up = [&](uint32_t begin, uint32_t end, int64_t offset) {
    for (uint32_t i = begin + device::thread_index(); i < end; i += device::num_threads()) {
      out[i + offset] = static_cast<int32_t>(i);
    }
  };
  count_up(slice.begin, smaller(slice.end, keys.first), 0);
  count_up(larger(slice.begin, keys.last), smaller(slice.end, keys.length),
           int64_t{keys.first} + num_chosen - keys.last);
  const int64_t total = int64_t{keys.first} + num_chosen + (keys.length - keys.last);
  const int64_t in_slices = slice.number * device::num_threads() + device::thread_index();
  for (int64_t i = total + in_slices; i < rule.p.k; i += slice.num_slices * device::num_threads()) {
    out[i] = -1;
  }
  if (in_slices == 0) rule.p.counts[row] = static_cast<int32_t>(total);

  // count
  int64_t better = 0, tied = 0, all;
  run.for_each([&](uint32_t i, uint32_t key) {
    better += keys.competes(i) && key > cut.key;
    tied += keys.competes(i) && key == cut.key;
  });
  better = slice.num_better + sum_before_warp(reduce_warp(better, Sum()), all, slots);
  tied = slice.num_tied + sum_before_warp(reduce_warp(tied, Sum()), all, slots);

  // write
  run.for_each_group([&](uint32_t begin, const uint32_t (&group)[kGroup]) {
    uint32_t above = 0, at = 0;  // bits
#pragma unroll
    for (uint32_t e = 0; e < kGroup; ++e) {
      const bool competes = keys.competes(begin + e);
      above |= uint32_t{competes && group[e] > cut.key} << e;
      at |= uint32_t{competes && group[e] == cut.key} << e;
    }
    if (device::ballot((above | at) != 0) == 0) return;
    const int64_t own = device::count_bits(above) | int64_t{device::count_bits(at)} << 32;
    const int64_t through = scan_warp(own);
    int64_t num_better = better + static_cast<int32_t>(through - own);
    int64_t num_tied = tied + ((through - own) >> 32);
#pragma unroll
    for (uint32_t e = 0; e < kGroup; ++e) {
      const bool is_better = above >> e & 1, is_tied = at >> e & 1;
      if (is_better || (is_tied && num_tied < cut.num_ties)) {
        const int64_t ties = num_tied < cut.num_ties ? num_tied : cut.num_ties;
        out[keys.first + num_better + ties] = static_cast<int32_t>(begin + e);
      }
      num_better += is_better;
      num_tied += is_tied;
    }
    const int64_t of_warp = device::shuffle(through, device::kWarpSize - 1);
    better += static_cast<int32_t>(of_warp);
    tied += of_warp >> 32;
  });
}

// Grid: rows, whose scores fit shared memory behind TopKShared.
template <class Bits>
LONGCTX_KERNEL(kMaxRowThreads, 1)
topk_row_kernel(const SelectRule rule, const int digit_bits) {
  auto& shared = *reinterpret_cast<TopKShared*>(device::shared_memory());
  const int64_t row = device::block_index();
  RowKeys<Bits> keys(rule, row);

  // load keys
  auto* const staged =
      reinterpret_cast<Bits*>(device::shared_memory() + TopKShared::bytes(rule.cumulative));
  KeyRun<Bits>(keys, 0, keys.length)
      .for_each_group([&](uint32_t i, const uint32_t (&group)[RowKeys<Bits>::kGroup]) {
        typename RowKeys<Bits>::Group stored;
#pragma unroll
        for (uint32_t e = 0; e < RowKeys<Bits>::kGroup; ++e) {
          stored.values[e] = static_cast<Bits>(group[e]);
        }
        if (i < keys.length) {
          *reinterpret_cast<typename RowKeys<Bits>::Group*>(staged + i) = stored;
        }
      });
  device::sync_threads();
  keys.use(staged);
  const KeyRun<Bits> run(keys, 0, keys.length);

  // best score, mass of the forced
  const uint32_t best = rule.cumulative ? highest_key(keys, run, shared.slots) : 0;
  const KeyMass weight = key_mass(rule, best, keys.length);
  const int64_t forced =
      rule.cumulative ? forced_mass(keys, 0, keys.length, weight, shared.slots) : 0;

  // cut
  KeySearch search(keys.places);
  constexpr int kKeyBits = 8 * static_cast<int>(sizeof(Bits));
  for (int pass = 0; pass * digit_bits < kKeyBits && search.outcome == KeySearch::kOpen; ++pass) {
    const KeyDigit digit = digit_of_pass(kKeyBits, digit_bits, pass);
    sum_by_digit(rule, keys, run, search, digit, weight, shared);
    if (rule.cumulative && pass == 0) {
      search.want_share(rule.value, forced + mass_of_clusters(shared, digit), forced);
    }
    search.take_digit(digit, ClusterSums{shared, rule.cumulative}, [&](int cluster) {
      return DigitSums{shared, rule.cumulative, cluster * kCluster};
    });
    device::sync_threads();
  }

  // write
  const KeyCut cut = search.cut(rule.floor, weight);
  write_chosen(rule, row, keys, run, cut, search.num_chosen(keys.places, cut),
               WrittenSlice{0, keys.length, 0, 1, 0, 0}, shared.slots);
}

}  // namespace longctx::cuda
