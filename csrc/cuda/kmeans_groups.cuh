// Points grouped by their label, each group in the order of the points: a counting sort by one
// block of threads a head, whose warps have a run of points each. Before it empty clusters get
// points. No sum is of floats, and nothing is atomic.
#pragma once
#include "cuda/kmeans_seeds.cuh"

namespace longctx::cuda {

constexpr int kMaxGroupThreads = 1024;

// Lanes with the same label, which has `bits`; of -1, none. A whole warp calls this.
LONGCTX_DEVICE uint32_t lanes_with(int32_t label, int bits) {
  uint32_t same = device::ballot(label >= 0);
  for (int b = 0; b < bits; ++b) {
    const bool set = (label >> b & 1) != 0;
    const uint32_t lanes = device::ballot(set);
    same &= set ? lanes : ~lanes;
  }
  return label >= 0 ? same : 0;
}

class PointGroups {
 public:
  LONGCTX_DEVICE PointGroups(const KMeansJob& job, int64_t head, BlockSlots& slots)
      : job_(job),
        slots_(slots),
        head_(head),
        num_clusters_(job.p.num_clusters),
        run_(job.p.n),
        labels_(job.p.labels + head * job.p.n),
        places_(job.places + head * job.group_warps * num_clusters_),
        offsets_(job.offsets + head * (num_clusters_ + 1)) {}

  // The number of points of each cluster, and of those that each warp has.
  LONGCTX_DEVICE void count() {
    for (int64_t i = device::thread_index(); i < job_.group_warps * num_clusters_;
         i += device::num_threads()) {
      places_[i] = 0;
    }
    device::sync_threads();
    for_each_group([&](uint32_t lanes, int32_t& place, int64_t) {
      if (is_first(lanes)) place += device::count_bits(lanes);
    });
    device::sync_threads();
    for_each_cluster([&](int64_t c) {
      int32_t size = 0;
      for (int w = 0; w < job_.group_warps; ++w) size += places_[w * num_clusters_ + c];
      offsets_[c] = size;
    });
    device::sync_threads();
  }

  // Empty clusters, in ascending order, take the points farthest from their centroids, the first of
  // those as far: never the last one of its cluster, and none that lies on its centroid. Returns
  // whether any did.
  LONGCTX_DEVICE bool fill_empty() {
    bool moved = false;
    int64_t before = INT64_MAX;  // of the point that was looked at last
    for (int64_t empty = next_empty(0); empty < num_clusters_; empty = next_empty(empty + 1)) {
      int64_t point;
      int32_t label;
      do {
        before = farthest(before);
        if (before >> 32 == 0) return moved;
        point = INT32_MAX - (before & INT32_MAX);
        label = labels_[point];
      } while (offsets_[label] < 2);
      device::sync_threads();  // all have read what changes now
      if (device::thread_index() == 0) {
        int32_t* places = places_ + run_.warp_of(point) * num_clusters_;
        labels_[point] = static_cast<int32_t>(empty);
        --places[label];
        ++places[empty];
        --offsets_[label];
        offsets_[empty] = 1;
      }
      device::sync_threads();
      moved = true;
    }
    return moved;
  }

  // Sizes become offsets, and the warps' counts the places of their first points.
  LONGCTX_DEVICE void find_places() {
    int64_t before = 0;
    for (int64_t first = 0; first < num_clusters_; first += device::num_threads()) {
      const int64_t c = first + device::thread_index();
      const int64_t size = c < num_clusters_ ? offsets_[c] : 0;
      const int64_t through = scan_warp(size);
      int64_t total;
      const int64_t warps_before =
          sum_before_warp(device::shuffle(through, device::kWarpSize - 1), total, slots_);
      if (c < num_clusters_) {
        auto place = static_cast<int32_t>(before + warps_before + through - size);
        offsets_[c] = place;
        for (int w = 0; w < job_.group_warps; ++w) {
          int32_t& of_warp = places_[w * num_clusters_ + c];
          const int32_t count = of_warp;
          of_warp = place;
          place += count;
        }
      }
      before += total;
    }
    if (device::thread_index() == 0) offsets_[num_clusters_] = static_cast<int32_t>(before);
    device::sync_threads();
  }

  LONGCTX_DEVICE void write_members() {
    int32_t* members = job_.members + head_ * job_.p.n;
    for_each_group([&](uint32_t lanes, int32_t& place, int64_t point) {
      const uint32_t lower = (uint32_t{1} << device::lane_index()) - 1;
      const int32_t first = place;
      device::sync_warp();  // all have read it
      if (lanes == 0) return;
      members[first + device::count_bits(lanes & lower)] = static_cast<int32_t>(point);
      if (is_first(lanes)) place = first + device::count_bits(lanes);
    });
  }

 private:
  LONGCTX_DEVICE static bool is_first(uint32_t lanes) {
    return lanes != 0 && device::lowest_bit(lanes) == device::lane_index();
  }

  // visit(lanes with this lane's label, 0 without a point; its place of this warp; the point).
  template <class Visit>
  LONGCTX_DEVICE void for_each_group(const Visit& visit) const {
    int32_t* places = places_ + device::thread_index() / device::kWarpSize * num_clusters_;
    run_.for_each_chunk([&](int64_t first) {
      const int64_t point = first + device::lane_index();
      const int32_t label = point < run_.end ? labels_[point] : -1;
      visit(lanes_with(label, job_.label_bits), places[label < 0 ? 0 : label], point);
      device::sync_warp();
    });
  }

  template <class Visit>
  LONGCTX_DEVICE void for_each_cluster(const Visit& visit) const {
    for (int64_t c = device::thread_index(); c < num_clusters_; c += device::num_threads())
      visit(c);
  }

  // From `first` on; num_clusters without one.
  LONGCTX_DEVICE int64_t next_empty(int64_t first) {
    int64_t found = num_clusters_;
    for_each_cluster([&](int64_t c) {
      if (c >= first && c < found && offsets_[c] == 0) found = c;
    });
    return -reduce_block(-found, Maximum(), slots_);
  }

  // The farthest point behind `before` in the order of (distance descending, index ascending), as
  // its distance's bits over the index counted down.
  LONGCTX_DEVICE int64_t farthest(int64_t before) {
    const int64_t at = head_ * job_.p.n;
    int64_t found = 0;
    for (int64_t i = device::thread_index(); i < job_.p.n; i += device::num_threads()) {
      if (labels_[i] < 0) continue;
      const float distance = seed_square_distance(job_.squares[at + i], job_.scores[at + i]);
      int32_t bits;
      memcpy(&bits, &distance, sizeof(bits));
      const int64_t key = int64_t{bits} << 32 | (INT32_MAX - i);
      if (key < before && key > found) found = key;
    }
    return reduce_block(found, Maximum(), slots_);
  }

  const KMeansJob& job_;
  BlockSlots& slots_;
  int64_t head_, num_clusters_;
  WarpRun run_;
  int32_t* labels_;
  int32_t* places_;
  int32_t* offsets_;
};

// Grid: heads. `iteration` num_iters is the last grouping, of the result.
LONGCTX_KERNEL(kMaxGroupThreads, 1)
group_points_kernel(const LONGCTX_GRID_CONSTANT KMeansJob job, const int64_t iteration) {
  auto& slots = *reinterpret_cast<BlockSlots*>(device::shared_memory());
  KMeansState& state = job.states[device::block_index()];
  const bool rests =
      iteration > 0 && (state.at_rest != 0 || (state.changed == 0 && state.moved == 0));
  device::sync_threads();
  if (rests) {  // the groups are still right
    if (device::thread_index() == 0) state.at_rest = 1;
    return;
  }
  PointGroups groups(job, device::block_index(), slots);
  groups.count();
  const bool moved = iteration < job.p.num_iters && groups.fill_empty();
  groups.find_places();
  groups.write_members();
  if (device::thread_index() != 0) return;
  state.changed = 0;
  state.moved = moved;
  state.at_rest = 0;
}

}  // namespace longctx::cuda
