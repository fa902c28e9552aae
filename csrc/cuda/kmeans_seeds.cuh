// Draws seeds: one block of threads goes over the masses of a head's points.
#pragma once
#include "cuda/kmeans_nearest.cuh"

namespace longctx::cuda {

constexpr int kMaxDrawThreads = 1024;

// A run of points for each warp of the block.
struct WarpRun {
  int64_t begin, end, own;
  LONGCTX_DEVICE explicit WarpRun(int64_t n) {
    const int64_t warps = device::num_threads() / device::kWarpSize;
    const int64_t chunks = (n + device::kWarpSize - 1) / device::kWarpSize;
    own = (chunks + warps - 1) / warps * device::kWarpSize;
    begin = device::thread_index() / device::kWarpSize * own;
    end = begin + own < n ? begin + own : n;
  }
  LONGCTX_DEVICE int64_t warp_of(int64_t point) const { return point / own; }
  // visit(first point of the chunk), called by whole warps.
  template <class Visit>
  LONGCTX_DEVICE void for_each_chunk(const Visit& visit) const {
    for (int64_t first = begin; first < end; first += device::kWarpSize) visit(first);
  }
};

// Makes the seeds of a round centroids; those that have not competed yet, none when seeding is
// over. All threads call this; what it wrote is there after the next barrier.
template <class T>
LONGCTX_DEVICE CentroidRange draw_seeds(const KMeansJob& job, int64_t head, int round,
                                        BlockSlots& slots) {
  KMeansState& state = job.states[head];
  const int64_t before = round == 0 ? 0 : state.count;
  if (round > 0 && state.first == before) return {before, before};
  double* masses = job.masses + head * job.p.n;
  const WarpRun run(job.p.n);
  const int lane = device::lane_index();

  // largest mass, number of points
  int64_t largest_bits = 0, num_points = 0;  // floats that are not negative order as integers
  run.for_each_chunk([&](int64_t first) {
    const double mass = first + lane < run.end ? masses[first + lane] : 0.0;
    int64_t bits;
    memcpy(&bits, &mass, sizeof(bits));
    largest_bits = Maximum()(largest_bits, bits);
    num_points += bits != 0;
  });
  largest_bits = reduce_block(largest_bits, Maximum(), slots);
  num_points = round == 0 ? reduce_block(num_points, Sum(), slots) : state.num_points;
  double largest;
  memcpy(&largest, &largest_bits, sizeof(largest));

  // As many as there are, at most half of what is missing; at first one point, all of mass 1.
  const int64_t wanted = num_points < job.p.num_clusters ? num_points : job.p.num_clusters;
  const int64_t half = (wanted - before + 1) / 2;
  const int64_t num_marks = round == 0 ? clamp_index(wanted, 0, 1) : clamp_index(half, 0, before);
  const double factor = round == 0 ? 1.0 : seed_mass_factor(largest, num_points);
  const double random = seed_uniform(job.p.seed, static_cast<uint64_t>(round));
  int64_t total_drawn = 0;
  if (num_marks > 0 && factor > 0.0) {
    const auto units = [&](int64_t i) {
      return i < run.end ? static_cast<int64_t>(masses[i] * factor) : int64_t{0};
    };
    int64_t own_units = 0, total;
    run.for_each_chunk([&](int64_t first) { own_units += units(first + lane); });
    const int64_t units_before = sum_before_warp(reduce_warp(own_units, Sum()), total, slots);
    const SeedMarks marks(num_marks, total, random);
    const double inverse_step = 1.0 / marks.step;
    const int64_t first_point = clamp_index(
        static_cast<int64_t>(random * static_cast<double>(num_points)), 0, num_points - 1);
    const auto num_passed = [&](int64_t sum) {
      return round == 0 ? static_cast<int64_t>(sum > first_point)
                        : marks.num_passed(sum, inverse_step);
    };

    // visit(whether this lane's point is drawn, its index)
    const auto for_each_point = [&](const auto& visit) {
      int64_t sum = units_before, passed = num_passed(sum);
      run.for_each_chunk([&](int64_t first) {
        const int64_t through = sum + scan_warp(units(first + lane));
        const int64_t own_passed = num_passed(through);
        const int64_t passed_before = device::shuffle_up(own_passed, 1);
        visit(own_passed > (lane == 0 ? passed : passed_before), first + lane);
        sum = device::shuffle(through, device::kWarpSize - 1);
        passed = device::shuffle(own_passed, device::kWarpSize - 1);
      });
    };
    int64_t own_drawn = 0;
    for_each_point(
        [&](bool drawn, int64_t) { own_drawn += device::count_bits(device::ballot(drawn)); });
    int64_t rank = sum_before_warp(own_drawn, total_drawn, slots);
    int32_t* seeds = job.seeds + head * job.p.num_clusters + before;
    for_each_point([&](bool drawn, int64_t i) {
      const uint32_t lanes = device::ballot(drawn);
      if (drawn) {
        const uint32_t lower = (uint32_t{1} << lane) - 1;
        seeds[rank + device::count_bits(lanes & lower)] = static_cast<int32_t>(i);
        job.chosen[head * job.p.n + i] = 1;
      }
      rank += device::count_bits(lanes);
    });
  }
  device::sync_threads();

  // centroids
  const int32_t* seeds = job.seeds + head * job.p.num_clusters + before;
  for (int64_t i = device::thread_index(); i < total_drawn * job.padded_dim;
       i += device::num_threads()) {
    const int64_t number = i % total_drawn, d = i / total_drawn, row = seeds[number];
    float x = 0.0f;
    if (d < job.p.dim) {
      x = job.point(device::widen(job.template key<T>(head, row)[d]), job.scale(head, row));
    }
    job.centroid(head, before + number)[d * job.panel] = x;
  }
  for (int64_t i = device::thread_index(); i < total_drawn; i += device::num_threads()) {
    job.bias(head, before + i) = -0.5f * job.squares[head * job.p.n + seeds[i]];
  }
  if (device::thread_index() == 0) {
    state.first = static_cast<int32_t>(before);
    state.count = static_cast<int32_t>(before + total_drawn);
    state.num_points = static_cast<int32_t>(num_points);
  }
  return {before, before + total_drawn};
}

// Grid of this and of the next kernel: heads.
template <class T>
LONGCTX_KERNEL(kMaxDrawThreads, 1)
draw_seeds_kernel(const LONGCTX_GRID_CONSTANT KMeansJob job, const int round) {
  auto& slots = *reinterpret_cast<BlockSlots*>(device::shared_memory());
  draw_seeds<T>(job, device::block_index(), round, slots);
}

// The rounds that are left, of which a head needs many only where few points have nearly all mass.
template <class T, int kOwnPoints, int kOwnCentroids>
LONGCTX_KERNEL(kNearestThreads, 1)
finish_seeding_kernel(const LONGCTX_GRID_CONSTANT KMeansJob job) {
  using Tile = NearestTile<T, kOwnPoints, kOwnCentroids>;
  auto& slots = *reinterpret_cast<BlockSlots*>(device::shared_memory());
  const int64_t head = device::block_index();
  Tile nearest(job, device::shared_memory() + sizeof(BlockSlots));
  for (int round = job.rounds;; ++round) {
    const CentroidRange drawn = draw_seeds<T>(job, head, round, slots);
    if (drawn.first == drawn.end) return;
    device::sync_threads();
    for (int64_t tile = 0; tile < Tile::num_tiles(job.p.n); ++tile) {
      nearest.run(head, tile, drawn, true);
      device::sync_threads();
    }
  }
}

}  // namespace longctx::cuda
