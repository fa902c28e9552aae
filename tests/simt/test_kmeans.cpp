// kmeans against its steps in float64.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <numeric>

#include "cuda/kernels.h"
#include "longctx/clusters.h"
#include "tensors.h"

namespace longctx::simt_tests {
namespace {

struct Cluster {
  DType dtype = DType::kFloat32;
  int64_t batch = 1, heads = 1, n = 140, dim = 20, num_clusters = 5, num_iters = 2;
  Layout layout = Layout::kHeadsFirst;
  bool cosine = true;
  bool with_counts = false;
  std::vector<int32_t> lengths;
  bool growing = false;  // each key is eight times the one before
  bool whole = false;    // values are whole numbers, and some clusters get empty
};

using Row = std::vector<double>;

// Of one head: the keys that exist, and their clusters, as the docstring has them.
struct Twin {
  std::vector<Row> keys, points, centroids;
  std::vector<int64_t> weights;
  std::vector<size_t> labels;
  std::vector<double> distances;
  bool moved = false;  // whether an empty cluster got a point

  static double square_distance(const Row& x, const Row& y) {
    double sum = 0, square = 0;
    for (size_t d = 0; d < x.size(); ++d) {
      sum += (x[d] - y[d]) * (x[d] - y[d]);
      square += x[d] * x[d];
    }
    return sum > 0x1p-18 * square ? sum : 0;
  }
  void assign() {
    labels.assign(points.size(), 0);
    distances.assign(points.size(), kInf);
    for (size_t i = 0; i < points.size(); ++i) {
      for (size_t c = 0; c < centroids.size(); ++c) {
        if (centroids[c].empty()) continue;
        const double distance = square_distance(points[i], centroids[c]);
        if (distance >= distances[i]) continue;
        distances[i] = distance;
        labels[i] = c;
      }
    }
  }
  size_t members(size_t c) const {
    return static_cast<size_t>(std::count(labels.begin(), labels.end(), c));
  }
  Row mean(const std::vector<Row>& rows, size_t c) const {
    Row sum(rows.empty() ? 0 : rows[0].size());
    double weight = 0;
    for (size_t i = 0; i < rows.size(); ++i) {
      if (labels[i] != c) continue;
      for (size_t d = 0; d < sum.size(); ++d) sum[d] += weights[i] * rows[i][d];
      weight += weights[i];
    }
    for (double& x : sum) x /= weight;
    return sum;
  }

  void seed(size_t num_clusters) {
    std::vector<size_t> drawn;
    const size_t wanted = std::min(num_clusters, points.size());
    if (wanted > 0) drawn = {static_cast<size_t>(seed_uniform(7, 0) * points.size())};
    std::vector<char> chosen(points.size());
    for (uint64_t round = 1; !drawn.empty(); ++round) {
      for (const size_t i : drawn) {
        chosen[i] = 1;
        centroids.push_back(points[i]);
      }
      assign();
      drawn.clear();
      const size_t marks = std::min(centroids.size(), (wanted - centroids.size() + 1) / 2);
      Row mass(points.size());
      for (size_t i = 0; i < points.size(); ++i)
        mass[i] = chosen[i] ? 0 : weights[i] * distances[i];
      const double step = std::accumulate(mass.begin(), mass.end(), 0.0) / marks;
      double sum = 0;
      size_t mark = 0;
      for (size_t i = 0; i < points.size(); ++i) {
        sum += mass[i];
        const size_t before = mark;
        while (mark < marks && (mark + seed_uniform(7, round)) * step < sum) ++mark;
        if (mark > before) drawn.push_back(i);
      }
    }
    centroids.resize(num_clusters);
  }

  void fill_empty() {
    std::vector<size_t> far_first(points.size());
    std::iota(far_first.begin(), far_first.end(), size_t{0});
    std::stable_sort(far_first.begin(), far_first.end(),
                     [&](size_t a, size_t b) { return distances[a] > distances[b]; });
    auto next = far_first.begin();
    for (size_t c = 0; c < centroids.size(); ++c) {
      if (members(c) > 0) continue;
      while (next != far_first.end() && members(labels[*next]) < 2) ++next;
      if (next == far_first.end() || distances[*next] == 0) return;
      labels[*next++] = c;
      moved = true;
    }
  }

  void run(const Cluster& c) {
    points = keys;
    for (Row& x : points) {
      const double norm = std::sqrt(std::inner_product(x.begin(), x.end(), x.begin(), 0.0));
      for (double& element : x) element /= c.cosine && norm > 0 ? norm : 1.0;
    }
    seed(static_cast<size_t>(c.num_clusters));
    for (int64_t i = 0; i < c.num_iters; ++i) {
      fill_empty();
      for (size_t j = 0; j < centroids.size(); ++j) {
        if (members(j) > 0) centroids[j] = mean(points, j);
      }
      assign();
    }
  }
};

void check(const Cluster& c) {
  std::mt19937 rng(5);
  Tensor keys(c.dtype, c.batch, c.heads, c.n, c.dim, c.layout);
  keys.fill_normal(rng);
  keys.for_each([&](int64_t b, int64_t h, int64_t i, int64_t d) {
    if (c.whole) keys.set(b, h, i, d, std::round(16 * keys.get(b, h, i, d)));
    if (c.growing) keys.set(b, h, i, d, std::pow(8.0, i - c.n / 2));
  });
  std::vector<int32_t> counts(static_cast<size_t>(c.batch * c.heads * c.n), 1);
  if (c.with_counts) {
    for (int32_t& count : counts) count = static_cast<int32_t>(rng() % 5) - 1;
  }
  std::vector<Twin> twins(static_cast<size_t>(c.batch * c.heads));
  std::vector<std::vector<int64_t>> rows(twins.size());
  for (size_t index = 0; index < twins.size(); ++index) {
    const auto at = static_cast<int64_t>(index);
    const int64_t length = c.lengths.empty() ? c.n : c.lengths[index];
    for (int64_t i = 0; i < std::min(length, c.n); ++i) {
      if (counts[at * c.n + i] <= 0) continue;
      rows[index].push_back(i);
      twins[index].weights.push_back(counts[at * c.n + i]);
      twins[index].keys.emplace_back();
      for (int64_t d = 0; d < c.dim; ++d) {
        twins[index].keys.back().push_back(keys.get(at / c.heads, at % c.heads, i, d));
      }
    }
    twins[index].run(c);
    ASSERT_EQ(twins[index].moved, c.whole) << "which of the tests have empty clusters";
  }

  in_every_mode([&] {
    const auto heads = static_cast<int64_t>(twins.size());
    Tensor centroids(c.dtype, c.batch, c.heads, c.num_clusters, c.dim);
    std::vector<int32_t> labels(static_cast<size_t>(heads * c.n), -7);
    std::vector<int32_t> sizes(static_cast<size_t>(heads * c.num_clusters), -7);
    KMeansParams params;
    params.dtype = c.dtype;
    params.keys = keys.view();
    if (c.with_counts) params.counts = {counts.data(), c.heads * c.n, c.n, 0};
    if (!c.lengths.empty()) params.lengths = {c.lengths.data(), c.heads, 1, 0};
    params.batch = c.batch;
    params.heads = c.heads;
    params.n = c.n;
    params.dim = c.dim;
    params.num_clusters = c.num_clusters;
    params.num_iters = c.num_iters;
    params.seed = 7;
    params.cosine = c.cosine;
    params.centroids = centroids.data();
    params.labels = labels.data();
    params.cluster_counts = sizes.data();
    cuda::run_kmeans_cuda(params);

    for (int64_t index = 0; index < heads; ++index) {
      const Twin& twin = twins[static_cast<size_t>(index)];
      std::vector<int32_t> expected(static_cast<size_t>(c.n), -1);
      for (size_t i = 0; i < twin.keys.size(); ++i) {
        expected[rows[index][i]] = static_cast<int32_t>(twin.labels[i]);
      }
      const auto first = labels.begin() + index * c.n;
      ASSERT_EQ(std::vector<int32_t>(first, first + c.n), expected) << "labels of head " << index;
      for (int64_t j = 0; j < c.num_clusters; ++j) {
        int64_t size = 0;
        for (size_t i = 0; i < twin.keys.size(); ++i) {
          if (twin.labels[i] == static_cast<size_t>(j)) size += twin.weights[i];
        }
        ASSERT_EQ(sizes[index * c.num_clusters + j], size);
        const Row mean = twin.mean(twin.keys, static_cast<size_t>(j));
        for (int64_t d = 0; d < c.dim; ++d) {
          const double wanted = size == 0 ? 0.0 : mean[d];
          expect_close(centroids.get(index / c.heads, index % c.heads, j, d), wanted,
                       2 * unit(c.dtype) * (1e-3 + std::fabs(wanted)), "centroid");
        }
      }
    }
  });
}

TEST(kmeans, more_centroids_than_a_panel) {
  Cluster c;
  c.dtype = DType::kBFloat16;
  c.n = 75;
  c.num_clusters = 70;
  c.num_iters = 1;
  check(c);
}
TEST(kmeans, wide_rows) {
  Cluster c;
  c.dtype = DType::kFloat16;
  c.n = 260;  // two warps group them
  c.dim = 136;
  c.layout = Layout::kRowsFirst;
  check(c);
}
TEST(kmeans, weights_and_lengths) {
  Cluster c;
  c.batch = c.heads = 2;
  c.n = 60;
  c.dim = 7;
  c.cosine = false;
  c.with_counts = true;
  c.lengths = {60, 0, 1, 51};
  c.layout = Layout::kOdd;
  check(c);
}
TEST(kmeans, empty_clusters) {
  Cluster c;
  c.dim = 1;
  c.cosine = false;
  c.whole = true;
  c.num_clusters = 45;
  c.num_iters = 3;
  check(c);
}
// A round of seeding draws little more than the farthest point: more rounds than have launches.
TEST(kmeans, seeds_one_by_one) {
  Cluster c;
  c.n = c.num_clusters = 22;
  c.dim = 1;
  c.cosine = false;
  c.growing = true;
  c.num_iters = 0;
  check(c);
}
TEST(kmeans, no_keys) {
  Cluster c;
  c.n = 0;
  check(c);
}

}  // namespace
}  // namespace longctx::simt_tests
