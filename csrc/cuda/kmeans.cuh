// kmeans: Lloyd's algorithm in float32 products and float64 sums, the CPU's in their order: for
// each point and centroid one chain of fused multiply-adds, so that the labels are the CPU's too.
//   read      what a key is scaled by, and the square of the point
//   seeds     a launch draws, one block of threads a head, the next lets what was drawn compete for
//             the points. Rounds that heads may need beyond the usual number are one launch.
//   iteration group the points by cluster, one block of threads a head; the mean of each cluster;
//             the nearest centroid of each point. A head at rest skips all three.
// Points are not stored: keys are scaled anew where they are read.
#pragma once
#include "cuda/block_reduce.cuh"
#include "cuda/key_rows.cuh"
#include "longctx/clusters.h"

namespace longctx::cuda {

constexpr int kDepth = 16;  // dims of centroids that are in shared memory at a time

// Of a (batch entry, head).
struct KMeansState {
  int32_t num_points;
  int32_t first, count;  // centroids: `first` of them have competed; equal when seeding is over
  uint32_t changed;      // labels, by the last assignment
  int32_t moved;         // whether points went to empty clusters before it
  int32_t at_rest;
};

// Arrays of each of `num_heads` (batch entries * heads).
struct KMeansJob {
  KMeansParams p;
  bool aligned = false;  // rows of keys start at multiples of 16 bytes
  int64_t num_heads = 0;
  int64_t padded_dim = 0;  // to kDepth
  int64_t panel = 0;       // centroids side by side
  int64_t num_panels = 0;
  int group_warps = 0;         // that group the points of a head
  int label_bits = 0;          // of the largest label
  int rounds = 0;              // of seeding that have launches of their own
  double* scales = nullptr;    // [n], or null: points are the keys
  float* squares = nullptr;    // [n] of points
  float* scores = nullptr;     // [n]: x . c - |c|^2 / 2 of the nearest centroid
  double* masses = nullptr;    // [n] to draw seeds from
  uint8_t* chosen = nullptr;   // [n]: whether it is a seed
  int32_t* seeds = nullptr;    // [num_clusters] points
  float* centroids = nullptr;  // [num_panels, padded_dim, panel]
  float* biases = nullptr;     // [num_panels, panel]: -|c|^2 / 2; -inf: no centroid
  int32_t* places = nullptr;   // [group_warps, num_clusters]
  int32_t* offsets = nullptr;  // [num_clusters + 1] into members
  int32_t* members = nullptr;  // [n] points by cluster, each cluster's in their order
  KMeansState* states = nullptr;

  LONGCTX_DEVICE int64_t panel_floats() const { return padded_dim * panel; }
  LONGCTX_DEVICE float* centroid(int64_t head, int64_t number) const {
    return centroids + (head * num_panels + number / panel) * panel_floats() + number % panel;
  }
  LONGCTX_DEVICE float& bias(int64_t head, int64_t number) const {
    return biases[head * num_panels * panel + number];
  }
  LONGCTX_DEVICE int64_t length(int64_t head) const {
    if (p.lengths.data == nullptr) return p.n;
    return clamp_index(*p.lengths.row(head / p.heads, head % p.heads, 0), 0, p.n);
  }
  // How many keys a row below the length stands for.
  LONGCTX_DEVICE int32_t weight(int64_t head, int64_t row) const {
    return p.counts.data == nullptr ? 1 : p.counts.row(head / p.heads, head % p.heads, 0)[row];
  }
  template <class T>
  LONGCTX_DEVICE const T* key(int64_t head, int64_t row) const {
    return key_row<T>(p.keys, PagesParams(), head / p.heads, head % p.heads, row);
  }
  // Coordinate of the point made of a key's.
  LONGCTX_DEVICE float point(float x, double scale) const {
    return scales == nullptr ? x : static_cast<float>(scale * static_cast<double>(x));
  }
  LONGCTX_DEVICE double scale(int64_t head, int64_t row) const {
    return scales == nullptr ? 1.0 : scales[head * p.n + row];
  }
};

constexpr int kReadThreads = 128;

// Grid: heads * blocks of rows. A thread has a row, whose squares are summed in their order.
template <class T>
LONGCTX_KERNEL(kReadThreads, 1)
read_points_kernel(const LONGCTX_GRID_CONSTANT KMeansJob job) {
  const int64_t blocks = (job.p.n + kReadThreads - 1) / kReadThreads;
  const int64_t head = device::block_index() / blocks;
  const int64_t row = device::block_index() % blocks * kReadThreads + device::thread_index();
  if (row >= job.p.n) return;
  const int64_t at = head * job.p.n + row;
  const bool exists = row < job.length(head) && job.weight(head, row) > 0;
  job.p.labels[at] = exists ? 0 : -1;
  job.scores[at] = -INFINITY;
  job.masses[at] = exists ? 1.0 : 0.0;  // the first seed is any point
  job.chosen[at] = 0;
  if (!exists) return;

  const int dim = static_cast<int>(job.p.dim);
  const T* key = job.template key<T>(head, row);
  const auto square = [&](const auto& coordinate) {
    double sum = 0.0;
    for (int first = 0; first < dim; first += kEight) {
      float x[kEight];
      load_eight(key, first, dim, job.aligned, x);
#pragma unroll
      for (int e = 0; e < kEight; ++e) {
        const double wide = coordinate(x[e]);
        sum += wide * wide;
      }
    }
    return sum;
  };
  double scale = 1.0;
  if (job.scales != nullptr) {
    const double of_key = square([](float x) { return x; });
    scale = of_key > 0.0 ? 1.0 / sqrt(of_key) : 0.0;
    job.scales[at] = scale;
  }
  const double of_point = square([&](float x) { return job.point(x, scale); });
  job.squares[at] = static_cast<float>(of_point);
}

constexpr int kMeanWarps = kMemberRuns;
constexpr int kMeanThreads = kMeanWarps * device::kWarpSize;
constexpr int kMeanDims = 8;  // of a lane
constexpr int kMaxDim = kMeanDims * device::kWarpSize;

struct MeanShared {
  BlockSlots slots;
  double sums[kMeanWarps][kMaxDim];
  float mean[kMaxDim];
};

// Grid: heads * clusters. Members are summed in their order, a run by each warp. `last`: of keys as
// they are given, into the outputs; else of points, and a cluster without members keeps its
// centroid.
template <class T>
LONGCTX_KERNEL(kMeanThreads, 4)
cluster_means_kernel(const LONGCTX_GRID_CONSTANT KMeansJob job, const bool last) {
  auto& shared = *reinterpret_cast<MeanShared*>(device::shared_memory());
  const int64_t head = device::block_index() / job.p.num_clusters;
  const int64_t cluster = device::block_index() % job.p.num_clusters;
  if (!last && job.states[head].at_rest != 0) return;
  const int32_t* offsets = job.offsets + head * (job.p.num_clusters + 1) + cluster;
  const int32_t* members = job.members + head * job.p.n;
  const int begin = offsets[0], count = offsets[1] - begin;
  if (!last && count == 0) return;
  const int dim = static_cast<int>(job.p.dim), lane = device::lane_index();
  const int warp = device::warp_index();
  const int run = static_cast<int>(member_run(count));
  const int run_end = warp * run + run < count ? warp * run + run : count;

  // sum members
  double sums[kMeanDims] = {};
  int64_t weight = 0;
  for (int first = warp * run; first < run_end; first += device::kWarpSize) {
    const int num = run_end - first < device::kWarpSize ? run_end - first : device::kWarpSize;
    const int32_t own_row = members[begin + first + (lane < num ? lane : 0)];
    const int32_t own_weight = lane < num ? job.weight(head, own_row) : 0;
    const double own_scale = last ? 1.0 : job.scale(head, own_row);
    weight += own_weight;
    constexpr int kAtOnce = 4;
    for (int m = 0; m < num; m += kAtOnce) {
      float x[kAtOnce][kMeanDims];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int32_t row = device::shuffle(own_row, m + u);
        const T* key = job.template key<T>(head, row);
#pragma unroll
        for (int j = 0; j < kMeanDims; ++j) {
          const int d = j * device::kWarpSize + lane;
          x[u][j] = m + u < num && d < dim ? device::widen(key[d]) : 0.0f;
        }
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const double factor = device::shuffle(own_weight, m + u);
        const double scale = device::shuffle(own_scale, m + u);
#pragma unroll
        for (int j = 0; j < kMeanDims; ++j) {
          const float point = last ? x[u][j] : job.point(x[u][j], scale);
          sums[j] += factor * static_cast<double>(point);
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kMeanDims; ++j) shared.sums[warp][j * device::kWarpSize + lane] = sums[j];
  weight = reduce_block(weight, Sum(), shared.slots);

  // write
  const double divisor = weight > 0 ? static_cast<double>(weight) : 1.0;
  float* centroid = job.centroid(head, cluster);
  const int64_t output = head * job.p.num_clusters + cluster;
  for (int d = device::thread_index(); d < job.padded_dim; d += kMeanThreads) {
    double sum = shared.sums[0][d];
#pragma unroll
    for (int w = 1; w < kMeanWarps; ++w) sum += shared.sums[w][d];
    const float mean = static_cast<float>(sum / divisor);
    if (!last) {
      centroid[d * job.panel] = mean;
      shared.mean[d] = mean;
    } else if (d < dim) {
      device::narrow(mean, static_cast<T*>(job.p.centroids)[output * dim + d]);
    }
  }
  if (last) {
    constexpr int64_t kMaxCount = INT32_MAX;
    if (device::thread_index() == 0) {
      job.p.cluster_counts[output] = static_cast<int32_t>(weight < kMaxCount ? weight : kMaxCount);
    }
    return;
  }
  device::sync_threads();
  if (device::thread_index() != 0) return;
  double square = 0.0;
  for (int d = 0; d < dim; ++d) {
    const double wide = shared.mean[d];
    square += wide * wide;
  }
  job.bias(head, cluster) = static_cast<float>(-0.5 * square);
}

}  // namespace longctx::cuda
