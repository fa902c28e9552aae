// The nearest centroid of each point, from a product that is never stored. A block of threads keeps
// a tile of points in shared memory, one coordinate of all of them after the other, and centroids
// go by in panels, 16 coordinates at a time. A thread has 32 sums: of 8 points with 4 centroids, or
// 4 with 8 where the tile has half as many points of twice as many coordinates.
//
// A score x . c - |c|^2 / 2 is one chain of fused multiply-adds from the bias on, coordinate after
// coordinate: the same bits wherever the centroid stands, and the same as on the CPU. Tensor cores
// would round otherwise.
#pragma once
#include "cuda/kmeans.cuh"
#include "cuda/score_tile.cuh"

namespace longctx::cuda {

constexpr int kNearestThreads = 256;
constexpr int kNearestGroups = 16;  // of threads along a side of a tile

struct alignas(16) FourFloats {
  float x[4];
};
LONGCTX_DEVICE FourFloats load_four_floats(const float* aligned) {
  return *reinterpret_cast<const FourFloats*>(aligned);
}

// Centroids [first, end) of a head.
struct CentroidRange {
  int64_t first, end;
};

template <class T, int kOwnPoints, int kOwnCentroids>
class NearestTile {
 public:
  static constexpr int kPoints = kNearestGroups * kOwnPoints;
  static constexpr int kPanel = kNearestGroups * kOwnCentroids;
  static constexpr int kStageFloats = (kDepth + 1) * kPanel;  // coordinates, biases
  static constexpr int64_t shared_bytes(int64_t padded_dim) {
    return (padded_dim * kPoints + kStages * kStageFloats) * static_cast<int64_t>(sizeof(float));
  }
  static constexpr int64_t num_tiles(int64_t n) { return (n + kPoints - 1) / kPoints; }

  LONGCTX_DEVICE NearestTile(const KMeansJob& job, char* shared)
      : job_(job),
        points_(reinterpret_cast<float*>(shared)),
        stages_(points_ + job.padded_dim * kPoints) {}

  // Points of tile `tile` go over to centroids that score higher. While seeding only those of
  // `range` are new, and masses are what the next seeds are drawn by; else all compete anew. All
  // threads call this; shared memory is free after the next barrier.
  LONGCTX_DEVICE void run(int64_t head, int64_t tile, const CentroidRange& range, bool seeding) {
    const int64_t first_row = tile * kPoints;
    if (first_row >= job_.length(head)) return;
    load_points(head, first_row);
#pragma unroll
    for (int r = 0; r < kOwnPoints; ++r) {
      best_[r] = -INFINITY;
      number_[r] = 0;
    }
    visit_panels(head, range);
    write(head, first_row, seeding);
  }

 private:
  // Threads lie as 16 x 16 groups, a warp as 4 x 8 of them. Point, or centroid, `i` of a group.
  LONGCTX_DEVICE static int of_group(int group, int i) { return i / 4 * 64 + group * 4 + i % 4; }
  LONGCTX_DEVICE static int warp_column() { return device::warp_index() / 4; }
  LONGCTX_DEVICE static int point_group() {
    return device::warp_index() % 4 * 4 + device::lane_index() / 8;
  }
  LONGCTX_DEVICE static int centroid_group() {
    return warp_column() * 8 + device::lane_index() % 8;
  }

  // [padded_dim, kPoints], zeros where there is no point.
  LONGCTX_DEVICE void load_points(int64_t head, int64_t first_row) {
    constexpr int kParts = kNearestThreads / kPoints;
    const int own = device::thread_index() % kPoints, part = device::thread_index() / kPoints;
    const int64_t row = first_row + own;
    const bool exists = row < job_.p.n && job_.p.labels[head * job_.p.n + row] >= 0;
    const T* key = exists ? job_.template key<T>(head, row) : nullptr;
    const double scale = exists ? job_.scale(head, row) : 0.0;
    for (int first = part * kEight; first < job_.padded_dim; first += kParts * kEight) {
      float x[kEight] = {};
      if (exists) load_eight(key, first, static_cast<int>(job_.p.dim), job_.aligned, x);
#pragma unroll
      for (int e = 0; e < kEight; ++e) {
        points_[(first + e) * kPoints + own] = job_.point(x[e], scale);
      }
    }
  }

  LONGCTX_DEVICE void visit_panels(int64_t head, const CentroidRange& range) {
    const int slices = static_cast<int>(job_.padded_dim) / kDepth;
    const int first_panel = static_cast<int>(range.first / kPanel);
    const int num_panels = static_cast<int>((range.end + kPanel - 1) / kPanel) - first_panel;
    const int64_t start = head * job_.num_panels + first_panel;
    const float* next = job_.centroids + start * job_.panel_floats();
    const float* next_biases = job_.biases + start * kPanel;
    int load_slice = 0;
    const auto load = [&](int, int stage) {
      float* target = stages_ + stage * kStageFloats;
#pragma unroll
      for (int i = 0; i < kDepth * kPanel / 4; i += kNearestThreads) {
        const int at = (i + device::thread_index()) * 4;
        device::copy_async_16(target + at, next + at, 16);
      }
      next += kDepth * kPanel;
      if (load_slice == 0) {
        if (device::thread_index() < kPanel / 4) {
          const int at = device::thread_index() * 4;
          device::copy_async_16(target + kDepth * kPanel + at, next_biases + at, 16);
        }
        next_biases += kPanel;
      }
      load_slice = load_slice + 1 < slices ? load_slice + 1 : 0;
    };

    float acc[kOwnPoints][kOwnCentroids];
    int slice = 0;
    int64_t panel_begin = int64_t{first_panel} * kPanel;
    bool live = true;  // whether the warp has some of the range
    for_each_slice(num_panels * slices, load, [&](int, int stage) {
      const float* centroids = stages_ + stage * kStageFloats;
      if (slice == 0) {
        live = warp_has(panel_begin, range);
        begin_panel(acc, centroids + kDepth * kPanel);
      }
      if (live) add_products(acc, points_ + slice * kDepth * kPoints, centroids);
      if (++slice < slices) return;
      slice = 0;
      if (live) end_panel(acc, static_cast<int>(panel_begin));
      panel_begin += kPanel;
    });
  }

  LONGCTX_DEVICE static bool warp_has(int64_t panel_begin, const CentroidRange& range) {
    bool any = false;
#pragma unroll
    for (int part = 0; part < kPanel; part += 64) {
      const int64_t begin = panel_begin + part + warp_column() * device::kWarpSize;
      any |= begin < range.end && begin + device::kWarpSize > range.first;
    }
    return any;
  }

  using Acc = float[kOwnPoints][kOwnCentroids];
  LONGCTX_DEVICE static void begin_panel(Acc& acc, const float* biases) {
#pragma unroll
    for (int c = 0; c < kOwnCentroids; ++c) {
      const float bias = biases[of_group(centroid_group(), c)];
#pragma unroll
      for (int r = 0; r < kOwnPoints; ++r) acc[r][c] = bias;
    }
  }

  LONGCTX_DEVICE static void add_products(Acc& acc, const float* points, const float* centroids) {
    const float* point = points + of_group(point_group(), 0);
    const float* centroid = centroids + of_group(centroid_group(), 0);
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      FourFloats x[kOwnPoints / 4], c[kOwnCentroids / 4];
#pragma unroll
      for (int i = 0; i < kOwnPoints / 4; ++i)
        x[i] = load_four_floats(point + d * kPoints + i * 64);
#pragma unroll
      for (int i = 0; i < kOwnCentroids / 4; ++i) {
        c[i] = load_four_floats(centroid + d * kPanel + i * 64);
      }
#pragma unroll
      for (int r = 0; r < kOwnPoints; ++r) {
#pragma unroll
        for (int j = 0; j < kOwnCentroids; ++j) {
          acc[r][j] = fmaf(x[r / 4].x[r % 4], c[j / 4].x[j % 4], acc[r][j]);
        }
      }
    }
  }

  // Centroids come in ascending order: the first of equal ones stays.
  LONGCTX_DEVICE void end_panel(const Acc& acc, int panel_begin) {
#pragma unroll
    for (int c = 0; c < kOwnCentroids; ++c) {
      const int number = panel_begin + of_group(centroid_group(), c);
#pragma unroll
      for (int r = 0; r < kOwnPoints; ++r) {
        const bool better = acc[r][c] > best_[r];
        best_[r] = better ? acc[r][c] : best_[r];
        number_[r] = better ? number : number_[r];
      }
    }
  }

  LONGCTX_DEVICE static void take_better(float& best, int& number, float other, int other_number) {
    const bool better = other > best || (other == best && other_number < number);
    best = better ? other : best;
    number = better ? other_number : number;
  }

  LONGCTX_DEVICE void write(int64_t head, int64_t first_row, bool seeding) {
    float* best = stages_;                                      // [2 columns of warps][kPoints]
    int* numbers = reinterpret_cast<int*>(best + 2 * kPoints);  // the same
#pragma unroll
    for (int r = 0; r < kOwnPoints; ++r) {
#pragma unroll
      for (int mask = 1; mask < 8; mask *= 2) {
        const float other = device::shuffle_xor(best_[r], mask);
        take_better(best_[r], number_[r], other, device::shuffle_xor(number_[r], mask));
      }
      const int at = warp_column() * kPoints + of_group(point_group(), r);
      if (device::lane_index() % 8 == 0) {
        best[at] = best_[r];
        numbers[at] = number_[r];
      }
    }
    device::sync_threads();
    if (device::thread_index() >= kPoints) return;
    const int own = device::thread_index();
    float score = best[own];
    int number = numbers[own];
    take_better(score, number, best[kPoints + own], numbers[kPoints + own]);

    const int64_t row = first_row + own, at = head * job_.p.n + row;
    const int32_t before = row < job_.p.n ? job_.p.labels[at] : -1;
    if (seeding && before >= 0) {
      const float highest = job_.scores[at];
      if (score > highest) {
        job_.p.labels[at] = number;
        job_.scores[at] = score;
      }
      const float distance = seed_square_distance(job_.squares[at], fmaxf(score, highest));
      const double mass = static_cast<double>(job_.weight(head, row)) * distance;
      job_.masses[at] = job_.chosen[at] != 0 ? 0.0 : mass;
    }
    if (seeding) return;
    if (before >= 0) {
      job_.p.labels[at] = number;
      job_.scores[at] = score;
    }
    const bool changed = device::ballot(before >= 0 && before != number) != 0;
    if (changed && device::lane_index() == 0) {
      device::atomic_or_global(&job_.states[head].changed, 1u);
    }
  }

  const KMeansJob& job_;
  float* points_;
  float* stages_;
  float best_[kOwnPoints];
  int number_[kOwnPoints];
};

// Grid of this and of the next kernel: heads * tiles.
template <class T, int kOwnPoints, int kOwnCentroids>
LONGCTX_KERNEL(kNearestThreads, 1)
seeds_compete_kernel(const LONGCTX_GRID_CONSTANT KMeansJob job) {
  using Tile = NearestTile<T, kOwnPoints, kOwnCentroids>;
  const int64_t tiles = Tile::num_tiles(job.p.n), head = device::block_index() / tiles;
  const KMeansState& state = job.states[head];
  if (state.first == state.count) return;
  Tile(job, device::shared_memory())
      .run(head, device::block_index() % tiles, {state.first, state.count}, true);
}

template <class T, int kOwnPoints, int kOwnCentroids>
LONGCTX_KERNEL(kNearestThreads, 1)
assign_kernel(const LONGCTX_GRID_CONSTANT KMeansJob job) {
  using Tile = NearestTile<T, kOwnPoints, kOwnCentroids>;
  const int64_t tiles = Tile::num_tiles(job.p.n), head = device::block_index() / tiles;
  if (job.states[head].at_rest != 0) return;
  Tile(job, device::shared_memory())
      .run(head, device::block_index() % tiles, {0, job.p.num_clusters}, false);
}

}  // namespace longctx::cuda
