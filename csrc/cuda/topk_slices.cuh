// Long rows, each by several blocks of threads, in launches that go over the scores once each:
//   highest   the highest score of each slice (cumulative rule only)
//   digits    a launch for each digit of the keys, three for 32 bits, two for 16: the sums of each
//             slice by digit
//   write     the indices
// Every block of threads puts the sums of all slices of its row together anew: 64 clusters of
// digits and then the 32 digits of the one with the cut. So nothing has to be zero at first, no
// block waits for another one, and each slice's share of what is chosen is known without counting.
#pragma once
#include "cuda/topk_select.cuh"

namespace longctx::cuda {

constexpr int kSliceThreads = 256;
constexpr int kSliceBlocks = 2;  // on a multiprocessor at a time

struct SliceGrid {
  int64_t num_rows = 0;
  int64_t num_slices = 0;  // of a row
  uint32_t slice = 0;      // scores; a multiple of RowKeys::kChunk
  int num_passes = 0;
  int digit_bits = 0;
  KeySearch* searches = nullptr;  // [num_passes, num_rows], as they enter a pass
  // [2, num_rows, num_slices, entries()]: clusters, then digits; passes take turns
  int32_t* counts = nullptr;
  int64_t* masses = nullptr;         // the same; this and the next two for `cumulative` alone
  uint32_t* highest = nullptr;       // [num_rows, num_slices] keys
  int64_t* forced_masses = nullptr;  // [num_rows, num_slices]
  int32_t* better = nullptr;         // [num_rows, num_slices]: chosen whatever the last digit is

  LONGCTX_HD int64_t entries() const {
    return (int64_t{1} << digit_bits) + (int64_t{1} << digit_bits) / kCluster;
  }
  LONGCTX_DEVICE int64_t first_entry(int pass, int64_t row, int64_t number) const {
    return (((pass & 1) * num_rows + row) * num_slices + number) * entries();
  }
};

// The slice of this block of threads.
struct RowSlice {
  int64_t row, number;
  uint32_t begin, end;
  LONGCTX_DEVICE RowSlice(const SelectRule& rule, const SliceGrid& grid)
      : row(device::block_index() / grid.num_slices),
        number(device::block_index() % grid.num_slices),
        begin(static_cast<uint32_t>(number * grid.slice)),
        end(static_cast<uint32_t>(clamp_index(begin + int64_t{grid.slice}, 0, rule.p.scores.n))) {}
};

template <class Bits>
LONGCTX_DEVICE KeyDigit slice_digit(const SliceGrid& grid, int pass) {
  return digit_of_pass(8 * static_cast<int>(sizeof(Bits)), grid.digit_bits, pass);
}

// Takes the digit of a pass whose sums are there. All threads of the block call this.
LONGCTX_DEVICE void finish_pass(const SelectRule& rule, const SliceGrid& grid, int64_t row,
                                int pass, const KeyDigit& digit, KeySearch& search,
                                TopKShared& shared) {
  if (search.outcome != KeySearch::kOpen) return;
  const int64_t first = grid.first_entry(pass, row, 0);
  for (int c = device::thread_index(); c < kMaxClusters; c += device::num_threads()) {
    shared.counts.of_cluster[c] = 0;
    if (rule.cumulative) shared.masses.of_cluster[c] = 0;
  }
  for (int d = device::thread_index(); d < kCluster; d += device::num_threads()) {
    shared.counts.of_digit[d] = 0;
    if (rule.cumulative) shared.masses.of_digit.low[d] = shared.masses.of_digit.high[d] = 0;
  }
  device::sync_threads();

  // add(entry, sum) with the sum over some slices of entries [offset, offset + num); `num` is a
  // power of two and at most the number of threads.
  const auto sum_slices = [&](int offset, int num, const auto& add) {
    const int entry = device::thread_index() % num;
    Amount sum;
    for (int64_t s = device::thread_index() / num; s < grid.num_slices;
         s += device::num_threads() / num) {
      const int64_t at = first + s * grid.entries() + offset + entry;
      sum.count += grid.counts[at];
      if (rule.cumulative) sum.mass += grid.masses[at];
    }
    add(entry, sum);
    device::sync_threads();
  };
  sum_slices(0, digit.num_clusters(), [&](int cluster, const Amount& sum) {
    device::atomic_add_shared(&shared.counts.of_cluster[cluster], static_cast<int32_t>(sum.count));
    if (rule.cumulative) device::atomic_add_shared(&shared.masses.of_cluster[cluster], sum.mass);
  });
  if (rule.cumulative && pass == 0) {
    int64_t forced = 0;
    for (int64_t s = device::lane_index(); s < grid.num_slices; s += device::kWarpSize) {
      forced += grid.forced_masses[row * grid.num_slices + s];
    }
    forced = reduce_warp(forced, Sum());
    search.want_share(rule.value, forced + mass_of_clusters(shared, digit), forced);
  }
  search.take_digit(digit, ClusterSums{shared, rule.cumulative}, [&](int cluster) {
    sum_slices(digit.num_clusters() + cluster * kCluster, kCluster, [&](int d, const Amount& sum) {
      device::atomic_add_shared(&shared.counts.of_digit[d], static_cast<int32_t>(sum.count));
      if (rule.cumulative) shared.masses.of_digit.add(d, sum.mass);
    });
    return DigitSums{shared, rule.cumulative};
  });
  device::sync_threads();
}

// Grid of this and of the next two: num_rows * num_slices.
template <class Bits>
LONGCTX_KERNEL(kSliceThreads, kSliceBlocks)
topk_highest_kernel(const SelectRule rule, const SliceGrid grid) {
  auto& shared = *reinterpret_cast<TopKShared*>(device::shared_memory());
  const RowSlice slice(rule, grid);
  const RowKeys<Bits> keys(rule, slice.row);
  const KeyRun<Bits> run(keys, slice.begin, slice.end);
  const uint32_t highest = highest_key(keys, run, shared.slots);
  if (device::thread_index() == 0) grid.highest[device::block_index()] = highest;
}

template <class Bits>
LONGCTX_KERNEL(kSliceThreads, kSliceBlocks)
topk_digits_kernel(const SelectRule rule, const SliceGrid grid, const int pass) {
  auto& shared = *reinterpret_cast<TopKShared*>(device::shared_memory());
  const RowSlice slice(rule, grid);
  const RowKeys<Bits> keys(rule, slice.row);
  const KeyRun<Bits> run(keys, slice.begin, slice.end);

  // what earlier passes found
  KeySearch search(keys.places);
  if (pass > 0) {
    search = grid.searches[(pass - 1) * grid.num_rows + slice.row];
    finish_pass(rule, grid, slice.row, pass - 1, slice_digit<Bits>(grid, pass - 1), search, shared);
  } else if (rule.cumulative) {
    uint32_t best = 0;
    for (int64_t s = device::lane_index(); s < grid.num_slices; s += device::kWarpSize) {
      best = larger(grid.highest[slice.row * grid.num_slices + s], best);
    }
    search.best = static_cast<uint32_t>(reduce_warp(best, Maximum()));
  }
  if (slice.number == 0 && device::thread_index() == 0) {
    grid.searches[pass * grid.num_rows + slice.row] = search;
  }
  const KeyMass weight = key_mass(rule, search.best, keys.length);
  if (rule.cumulative && pass == 0) {
    const int64_t forced = forced_mass(keys, slice.begin, slice.end, weight, shared.slots);
    if (device::thread_index() == 0) grid.forced_masses[device::block_index()] = forced;
  }

  // sums by digit
  const KeyDigit digit = slice_digit<Bits>(grid, pass);
  int64_t better = sum_by_digit(rule, keys, run, search, digit, weight, shared);
  if (pass == grid.num_passes - 1) {
    better = reduce_block(better, Sum(), shared.slots);
    if (device::thread_index() == 0) {
      grid.better[device::block_index()] = static_cast<int32_t>(better);
    }
  }
  const int64_t first = grid.first_entry(pass, slice.row, slice.number);
  const ClusterSums clusters{shared, rule.cumulative};
  const DigitSums digits{shared, rule.cumulative};
  const int num_clusters = digit.num_clusters();
  for (int e = device::thread_index(); e < num_clusters * (1 + kCluster); e += kSliceThreads) {
    const Amount sum = e < num_clusters ? clusters(e) : digits(e - num_clusters);
    grid.counts[first + e] = static_cast<int32_t>(sum.count);
    if (rule.cumulative) grid.masses[first + e] = sum.mass;
  }
}

template <class Bits>
LONGCTX_KERNEL(kSliceThreads, kSliceBlocks)
topk_write_kernel(const SelectRule rule, const SliceGrid grid) {
  auto& shared = *reinterpret_cast<TopKShared*>(device::shared_memory());
  const RowSlice slice(rule, grid);
  const RowKeys<Bits> keys(rule, slice.row);
  const KeyRun<Bits> run(keys, slice.begin, slice.end);

  // cut
  const int pass = grid.num_passes - 1;
  const KeyDigit digit = slice_digit<Bits>(grid, pass);
  KeySearch search = grid.searches[pass * grid.num_rows + slice.row];
  finish_pass(rule, grid, slice.row, pass, digit, search, shared);
  const KeyCut cut = search.cut(rule.floor, key_mass(rule, search.best, keys.length));

  // what earlier slices write
  const int num_clusters = digit.num_clusters();
  const int last_digit = static_cast<int>(digit.of(search.prefix));
  const int cluster = last_digit / kCluster;
  const int64_t first = grid.first_entry(pass, slice.row, 0);
  int64_t better = 0, tied = 0;
  for (int64_t s = device::thread_index() / device::kWarpSize; s < slice.number;
       s += kSliceThreads / device::kWarpSize) {
    const int lane = device::lane_index();
    if (lane == 0) better += grid.better[slice.row * grid.num_slices + s];
    if (search.outcome != KeySearch::kOpen) continue;
    const int32_t* of_cluster = grid.counts + first + s * grid.entries();
    for (int c = cluster + 1 + lane; c < num_clusters; c += device::kWarpSize) {
      better += of_cluster[c];
    }
    const int32_t of_digit = of_cluster[num_clusters + cluster * kCluster + lane];
    if (lane > last_digit % kCluster) better += of_digit;
    if (lane == last_digit % kCluster) tied += of_digit;
  }
  better = reduce_block(better, Sum(), shared.slots);
  tied = reduce_block(tied, Sum(), shared.slots);

  // write
  write_chosen(rule, slice.row, keys, run, cut, search.num_chosen(keys.places, cut),
               WrittenSlice{slice.begin, slice.end, slice.number, grid.num_slices, better, tied},
               shared.slots);
}

}  // namespace longctx::cuda
