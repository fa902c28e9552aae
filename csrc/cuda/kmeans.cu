#include "cuda/fill.cuh"
#include "cuda/kernels.h"
#include "cuda/kmeans_groups.cuh"
#include "cuda/runtime.h"
#include "cuda/supported.h"

namespace longctx::cuda {
namespace {

constexpr const char* kOp = "kmeans";

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
dim3 grid_of(int64_t blocks) { return dim3(static_cast<unsigned>(blocks)); }

int bits_of(int64_t value) {
  int bits = 0;
  while (value >> bits != 0) ++bits;
  return bits;
}

// Of one block that goes over all points of a head: eight points each, as far as that goes.
int threads_of_head(int64_t n) {
  int threads = device::kWarpSize;
  while (threads < kMaxGroupThreads && threads * int64_t{8} < n) threads *= 2;
  return threads;
}

template <class T, int kOwnPoints, int kOwnCentroids>
void cluster(KMeansJob job) {
  using Tile = NearestTile<T, kOwnPoints, kOwnCentroids>;
  const KMeansParams& p = job.p;
  const int64_t points = job.num_heads * p.n, clusters = job.num_heads * p.num_clusters;
  const int threads = threads_of_head(p.n);
  job.aligned = rows_aligned(p.keys, sizeof(T));
  job.panel = Tile::kPanel;
  job.num_panels = ceil_div(p.num_clusters, job.panel);
  job.group_warps = threads / device::kWarpSize;
  job.label_bits = bits_of(p.num_clusters - 1);
  // Rounds double the seeds and then halve what is missing; some for marks that share a point.
  const int usual_rounds = 2 * job.label_bits + 6;
  job.rounds = p.num_clusters < usual_rounds ? static_cast<int>(p.num_clusters) : usual_rounds;

  const auto bytes = [](int64_t count, size_t size) { return count * static_cast<int64_t>(size); };
  const int64_t columns = job.num_heads * job.num_panels * job.panel;
  const Workspace scales(p.cosine ? bytes(points, sizeof(double)) : 0);
  const Workspace squares(bytes(points, sizeof(float)));
  const Workspace scores(bytes(points, sizeof(float)));
  const Workspace masses(bytes(points, sizeof(double)));
  const Workspace chosen(points);
  const Workspace seeds(bytes(clusters, sizeof(int32_t)));
  const Workspace centroids(bytes(columns * job.padded_dim, sizeof(float)));
  const Workspace biases(bytes(columns, sizeof(float)));
  const Workspace places(bytes(clusters * job.group_warps, sizeof(int32_t)));
  const Workspace offsets(bytes(clusters + job.num_heads, sizeof(int32_t)));
  const Workspace members(bytes(points, sizeof(int32_t)));
  const Workspace states(bytes(job.num_heads, sizeof(KMeansState)));
  job.scales = scales.as<double>();
  job.squares = squares.as<float>();
  job.scores = scores.as<float>();
  job.masses = masses.as<double>();
  job.chosen = chosen.as<uint8_t>();
  job.seeds = seeds.as<int32_t>();
  job.centroids = centroids.as<float>();
  job.biases = biases.as<float>();
  job.places = places.as<int32_t>();
  job.offsets = offsets.as<int32_t>();
  job.members = members.as<int32_t>();
  job.states = states.as<KMeansState>();

  const dim3 heads = grid_of(job.num_heads), tiles = grid_of(job.num_heads * Tile::num_tiles(p.n));
  const int64_t tile_bytes = Tile::shared_bytes(job.padded_dim);
  const auto group_and_average = [&](int64_t iteration, bool last) {
    launch(kOp, &group_points_kernel, heads, threads, sizeof(BlockSlots), job, iteration);
    launch(kOp, &cluster_means_kernel<T>, grid_of(clusters), kMeanThreads, sizeof(MeanShared), job,
           last);
  };
  if (p.n == 0) return group_and_average(0, true);

  // What of a panel holds no centroid is never better than what does, whatever it is.
  fill(kOp, job.biases, columns, -INFINITY);
  launch(kOp, &read_points_kernel<T>, grid_of(job.num_heads * ceil_div(p.n, kReadThreads)),
         kReadThreads, 0, job);
  for (int round = 0; round < job.rounds; ++round) {
    launch(kOp, &draw_seeds_kernel<T>, heads, threads, sizeof(BlockSlots), job, round);
    launch(kOp, &seeds_compete_kernel<T, kOwnPoints, kOwnCentroids>, tiles, kNearestThreads,
           tile_bytes, job);
  }
  if (job.rounds < p.num_clusters) {
    launch(kOp, &finish_seeding_kernel<T, kOwnPoints, kOwnCentroids>, heads, kNearestThreads,
           static_cast<int64_t>(sizeof(BlockSlots)) + tile_bytes, job);
  }
  for (int64_t i = 0; i < p.num_iters; ++i) {
    group_and_average(i, false);
    launch(kOp, &assign_kernel<T, kOwnPoints, kOwnCentroids>, tiles, kNearestThreads, tile_bytes,
           job);
  }
  group_and_average(p.num_iters, true);
}

// Tiles of 128 points of up to 128 coordinates, and of 64 points of up to 256, take 64 KiB.
template <class T>
void cluster(const KMeansJob& job) {
  constexpr int64_t kWide = 128;
  static_assert(NearestTile<T, 8, 4>::shared_bytes(kWide) + sizeof(BlockSlots) <=
                kLeastSharedMemory);
  static_assert(NearestTile<T, 4, 8>::shared_bytes(kMaxDim) + sizeof(BlockSlots) <=
                kLeastSharedMemory);
  job.padded_dim <= kWide ? cluster<T, 8, 4>(job) : cluster<T, 4, 8>(job);
}

}  // namespace

void run_kmeans_cuda(const KMeansParams& p) {
  require_supported(kOp, p.dtype, p.dim, {}, "keys");
  KMeansJob job;
  job.p = p;
  job.num_heads = p.batch * p.heads;
  job.padded_dim = ceil_div(p.dim, kDepth) * kDepth;
  if (job.num_heads == 0) return;
  switch (p.dtype) {
    case DType::kBFloat16:
      return cluster<__nv_bfloat16>(job);
    case DType::kFloat16:
      return cluster<__half>(job);
    default:
      return cluster<float>(job);
  }
}

}  // namespace longctx::cuda
