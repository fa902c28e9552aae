// kmeans without torch, one thread: D=128, a cluster for 20 keys. Arguments: keys, iterations. The
// floor of an iteration is its product, 2 * keys * clusters * 128 FLOPs.
#include <benchmark/benchmark.h>

#include <random>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/nearest_kernels.h"
#include "inputs.h"

namespace longctx::cpu {
namespace {

constexpr int64_t kDim = 128;

void kmeans(benchmark::State& state, Isa isa) {
  const Isa before = active_isa();
  force_isa(isa);
  const int64_t n = state.range(0), clusters = n / 20;
  std::mt19937 rng(7);
  std::normal_distribution<float> normal;
  std::vector<float> keys(static_cast<size_t>(n * kDim));
  for (float& x : keys) x = normal(rng);
  std::vector<float> centroids(static_cast<size_t>(clusters * kDim));
  std::vector<int32_t> labels(static_cast<size_t>(n)), counts(static_cast<size_t>(clusters));
  KMeansParams params;
  params.dtype = DType::kFloat32;
  params.keys = {keys.data(), n * kDim, n * kDim, kDim};
  params.batch = params.heads = 1;
  params.n = n;
  params.dim = kDim;
  params.num_clusters = clusters;
  params.num_iters = state.range(1);
  params.cosine = true;
  params.centroids = centroids.data();
  params.labels = labels.data();
  params.cluster_counts = counts.data();
  for (auto _ : state) {
    run_kmeans_cpu(params);
    benchmark::DoNotOptimize(labels.data());
  }
  state.counters["FLOP/s"] =
      benchmark::Counter(2.0 * static_cast<double>(n * clusters * kDim * (params.num_iters + 1)),
                         benchmark::Counter::kIsIterationInvariantRate);
  force_isa(before);
}

constexpr auto kSizes = [](auto* bench) {
  for (const int64_t n : {8192, 32768}) {
    for (const int64_t num_iters : {0, 5}) bench->Args({n, num_iters});
  }
};

BENCHMARK_CAPTURE(kmeans, best, detected_isa())->Apply(kSizes);
BENCHMARK_CAPTURE(kmeans, avx2, Isa::kAvx2)->Args({8192, 5});
BENCHMARK_CAPTURE(kmeans, generic, Isa::kGeneric)->Args({8192, 5});

}  // namespace
}  // namespace longctx::cpu

BENCHMARK_MAIN();
