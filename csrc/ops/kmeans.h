// kmeans: keys -> centroids, the cluster of each key, and the sizes of the clusters.
#pragma once
#include <limits>

#include "checks.h"
#include "ops/attention_options.h"
#include "ops/block_map.h"

namespace longctx {

template <void (*run)(const KMeansParams&)>
std::tuple<Tensor, Tensor, Tensor> kmeans(const Tensor& keys, int64_t num_clusters,
                                          int64_t num_iters, int64_t seed, const Name& metric,
                                          const OptionalTensor& counts,
                                          const OptionalTensor& lengths) {
  const Checker check("kmeans");
  KMeansParams params;
  params.dtype = check.floating("keys", keys);
  check.shape("keys", keys, "[batch, heads, n, dim]", {kAnySize, kAnySize, kAnySize, kAnySize});
  check.require(keys.size(3) > 0, "keys", "have a dim of at least 1", keys.sizes());
  check.require(keys.size(2) <= std::numeric_limits<int32_t>::max(), "keys",
                "have indices that fit int32", keys.sizes());
  check.contiguous_last_dim("keys", keys);
  constexpr int64_t kMaxClusters = int64_t{1} << 24;
  check.require(num_clusters >= 1 && num_clusters <= kMaxClusters, "num_clusters",
                "be in [1, 2^24]", num_clusters);
  check.require(num_iters >= 0, "num_iters", "not be negative", num_iters);
  static constexpr const char* kMetrics[] = {"euclidean", "cosine"};
  params.cosine = enum_named<bool>(check, "metric", metric, kMetrics, "be 'cosine' or 'euclidean'");
  params.keys = view_of(keys);
  params.batch = keys.size(0);
  params.heads = keys.size(1);
  params.n = keys.size(2);
  params.dim = keys.size(3);
  params.num_clusters = num_clusters;
  params.num_iters = num_iters;
  params.seed = static_cast<uint64_t>(seed);
  if (counts) {
    check.same_device("counts", *counts, keys);
    check.dtype("counts", *counts, ScalarType::Int);
    check.shape("counts", *counts, "[batch, heads, n] of `keys`",
                {params.batch, params.heads, params.n});
    check.contiguous_last_dim("counts", *counts);
    params.counts = {counts->const_data_ptr<int32_t>(), counts->stride(0), counts->stride(1), 0};
  }
  if (lengths) {
    check.same_device("lengths", *lengths, keys);
    check.dtype("lengths", *lengths, ScalarType::Int);
    check.shape("lengths", *lengths, "[batch, heads] of `keys`", {params.batch, params.heads});
    params.lengths = {lengths->const_data_ptr<int32_t>(), lengths->stride(0), lengths->stride(1),
                      0};
  }

  const Tensor centroids = new_tensor(keys, {params.batch, params.heads, num_clusters, params.dim});
  const Tensor labels = new_tensor(keys, {params.batch, params.heads, params.n}, ScalarType::Int);
  const Tensor sizes =
      new_tensor(keys, {params.batch, params.heads, num_clusters}, ScalarType::Int);
  params.centroids = centroids.mutable_data_ptr();
  params.labels = labels.mutable_data_ptr<int32_t>();
  params.cluster_counts = sizes.mutable_data_ptr<int32_t>();
  run(params);
  return {centroids, labels, sizes};
}

}  // namespace longctx
