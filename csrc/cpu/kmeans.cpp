// Lloyd's k-means, seeded by rounds of k-means++ that double the number of centroids. The work is
// the product of points and centroids; everything that is summed is summed in the order of the
// rows, so that no bit depends on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "kernels.h"
#include "longctx/clusters.h"
#include "longctx/sequence.h"
#include "nearest_kernels.h"
#include "parallel.h"
#include "reduced_float.h"
#include "scratch.h"

namespace longctx::cpu {
namespace {

// The rows of one (batch entry, head) at a time.
template <class T, class In>
class KMeans {
 public:
  explicit KMeans(const KMeansParams& params)
      : p_(params),
        kernels_(choose_nearest_kernels(active_isa(), T(0))),
        num_panels_((params.num_clusters + kernels_.panel - 1) / kernels_.panel) {
    panels_.resize(static_cast<size_t>(num_panels_ * kernels_.panel * p_.dim));
    biases_.resize(static_cast<size_t>(num_panels_ * kernels_.panel));
    sizes_.resize(static_cast<size_t>(p_.num_clusters));
  }

  void run() {
    for (int64_t batch = 0; batch < p_.batch; ++batch) {
      for (int64_t head = 0; head < p_.heads; ++head) {
        read_points(batch, head);
        seed_centroids();
        for (int64_t i = 0; i < p_.num_iters; ++i) {
          const bool moved = fill_empty_clusters();
          update_centroids();
          const std::vector<int32_t> before = labels_;
          assign(num_panels_, 0);
          if (!moved && labels_ == before) break;  // nothing changes any more
        }
        write_result(batch, head);
      }
    }
  }

 private:
  int64_t num_points() const { return static_cast<int64_t>(rows_.size()); }
  const T* point(int64_t i) const { return points_.data() + i * p_.dim; }

  const In* key(int64_t batch, int64_t head, int64_t row) const {
    return static_cast<const In*>(p_.keys.data) + batch * p_.keys.batch_stride +
           head * p_.keys.head_stride + row * p_.keys.seq_stride;
  }

  void read_points(int64_t batch, int64_t head) {
    int64_t length = p_.n;
    if (p_.lengths.data != nullptr) length = clamp_index(*p_.lengths.row(batch, head, 0), 0, p_.n);
    const int32_t* counts = p_.counts.data == nullptr ? nullptr : p_.counts.row(batch, head, 0);
    rows_.clear();
    weights_.clear();
    for (int64_t i = 0; i < length; ++i) {
      if (counts != nullptr && counts[i] <= 0) continue;
      rows_.push_back(static_cast<int32_t>(i));
      weights_.push_back(counts == nullptr ? 1 : counts[i]);
    }
    points_.resize(rows_.size() * static_cast<size_t>(p_.dim));
    squares_.resize(rows_.size());
    for_each_block([&](int64_t begin, int64_t end, T*) {
      for (int64_t i = begin; i < end; ++i) {
        const In* from = key(batch, head, rows_[static_cast<size_t>(i)]);
        T* to = points_.data() + i * p_.dim;
        double scale = 1.0;
        if (p_.cosine) {
          const double square = square_of(from);
          scale = square > 0 ? 1.0 / std::sqrt(square) : 0.0;
        }
        for (int64_t d = 0; d < p_.dim; ++d) to[d] = static_cast<T>(scale * widen(from[d]));
        squares_[static_cast<size_t>(i)] = static_cast<T>(square_of(to));
      }
    });
    labels_.assign(rows_.size(), 0);
    best_.assign(rows_.size(), -std::numeric_limits<T>::infinity());
  }

  template <class Element>
  double square_of(const Element* x) const {
    double square = 0;
    for (int64_t d = 0; d < p_.dim; ++d) {
      const double wide = widen(x[d]);
      square += wide * wide;
    }
    return square;
  }

  // Calls work(begin, end, scratch) on blocks of points.
  template <class Work>
  void for_each_block(const Work& work) const {
    const int64_t bytes = 2 * kNearestRows * kernels_.panel * static_cast<int64_t>(sizeof(T));
    for_each_item((num_points() + kNearestRows - 1) / kNearestRows,
                  [&] { return static_cast<T*>(thread_scratch(static_cast<size_t>(bytes))); },
                  [&](int64_t block, T* scratch) {
                    const int64_t begin = block * kNearestRows;
                    work(begin, std::min(begin + kNearestRows, num_points()), scratch);
                  });
  }

  // Column `column` of the panels holds the centroid `mean`, or none if that is null.
  void put_centroid(int64_t column, const T* mean) {
    const int64_t panel = column / kernels_.panel, lane = column % kernels_.panel;
    T* to = panels_.data() + panel * kernels_.panel * p_.dim + lane;
    for (int64_t d = 0; d < p_.dim; ++d) to[d * kernels_.panel] = mean == nullptr ? T(0) : mean[d];
    biases_[static_cast<size_t>(column)] = mean == nullptr ? -std::numeric_limits<T>::infinity()
                                                           : static_cast<T>(-0.5 * square_of(mean));
  }

  void end_columns(int64_t count, int64_t num_panels) {
    for (int64_t i = count; i < num_panels * kernels_.panel; ++i) put_centroid(i, nullptr);
  }

  // Lets the centroids in the panels, of which the first is number `first`, compete for the points.
  void compete(int64_t num_panels, int64_t first) {
    for_each_block([&](int64_t begin, int64_t end, T* scratch) {
      kernels_.nearest(point(begin), end - begin, p_.dim, panels_.data(), biases_.data(),
                       num_panels, first, scratch, best_.data() + begin, labels_.data() + begin);
    });
  }

  void assign(int64_t num_panels, int64_t first) {
    std::fill(best_.begin(), best_.end(), -std::numeric_limits<T>::infinity());
    std::fill(labels_.begin(), labels_.end(), 0);
    compete(num_panels, first);
  }

  T square_distance(int64_t i) const {
    const auto at = static_cast<size_t>(i);
    return seed_square_distance(squares_[at], best_[at]);
  }

  // The first centroid is a random point. Each round then draws as many points as there are
  // centroids, or half of what is missing, with probability in proportion to weight times squared
  // distance: those at which the running sum of these passes evenly spaced marks with a random
  // offset, each once.
  void seed_centroids() {
    const int64_t wanted = std::min(p_.num_clusters, num_points());
    std::vector<char> chosen(rows_.size(), 0);
    std::vector<int64_t> seeds, drawn;
    if (wanted > 0) {
      const double at = seed_uniform(p_.seed, 0) * static_cast<double>(num_points());
      drawn.push_back(std::min(static_cast<int64_t>(at), num_points() - 1));
    }
    for (uint64_t round = 1; !drawn.empty(); ++round) {
      compete(put_points(drawn), static_cast<int64_t>(seeds.size()));
      for (const int64_t i : drawn) chosen[static_cast<size_t>(i)] = 1;
      seeds.insert(seeds.end(), drawn.begin(), drawn.end());
      const auto count = static_cast<int64_t>(seeds.size());
      drawn = draw(std::min(count, (wanted - count + 1) / 2), seed_uniform(p_.seed, round), chosen);
    }
    end_columns(put_points(seeds) * kernels_.panel, num_panels_);
  }

  // The points as centroids in the first columns; returns how many panels they take.
  int64_t put_points(const std::vector<int64_t>& points) {
    const auto count = static_cast<int64_t>(points.size());
    for (int64_t i = 0; i < count; ++i) put_centroid(i, point(points[static_cast<size_t>(i)]));
    const int64_t num_panels = (count + kernels_.panel - 1) / kernels_.panel;
    end_columns(count, num_panels);
    return num_panels;
  }

  // At most `count` points, ascending.
  std::vector<int64_t> draw(int64_t count, double offset, const std::vector<char>& chosen) const {
    const auto mass = [&](int64_t i) {
      const auto at = static_cast<size_t>(i);
      return chosen[at] != 0 ? 0.0 : static_cast<double>(weights_[at]) * square_distance(i);
    };
    std::vector<int64_t> drawn;
    double largest = 0;
    for (int64_t i = 0; i < num_points(); ++i) largest = std::max(largest, mass(i));
    const double factor = seed_mass_factor(largest, num_points());
    if (count == 0 || factor == 0) return drawn;
    const auto units = [&](int64_t i) { return static_cast<int64_t>(mass(i) * factor); };
    int64_t total = 0, sum = 0, mark = 0;
    for (int64_t i = 0; i < num_points(); ++i) total += units(i);
    const SeedMarks marks(count, total, offset);
    for (int64_t i = 0; i < num_points() && mark < count; ++i) {
      sum += units(i);
      if (!marks.passes(sum, mark)) continue;
      drawn.push_back(i);
      while (marks.passes(sum, mark)) ++mark;
    }
    return drawn;
  }

  // Empty clusters, in ascending order, take the points farthest from their centroids, the first of
  // those as far: never the last one of its cluster, and none that lies on its centroid.
  bool fill_empty_clusters() {
    std::fill(sizes_.begin(), sizes_.end(), 0);
    for (const int32_t label : labels_) ++sizes_[static_cast<size_t>(label)];
    if (std::find(sizes_.begin(), sizes_.end(), 0) == sizes_.end()) return false;
    std::vector<std::pair<T, int64_t>> heap;  // distance, and the point counted down
    heap.reserve(rows_.size());
    for (int64_t i = 0; i < num_points(); ++i) heap.emplace_back(square_distance(i), -i);
    std::make_heap(heap.begin(), heap.end());
    bool moved = false;
    for (size_t empty = 0; empty < sizes_.size(); ++empty) {
      if (sizes_[empty] != 0) continue;
      bool filled = false;
      while (!filled && !heap.empty() && heap.front().first > 0) {
        int32_t& label = labels_[static_cast<size_t>(-heap.front().second)];
        std::pop_heap(heap.begin(), heap.end());
        heap.pop_back();
        if (sizes_[static_cast<size_t>(label)] < 2) continue;
        --sizes_[static_cast<size_t>(label)];
        label = static_cast<int32_t>(empty);
        sizes_[empty] = 1;
        moved = filled = true;
      }
      if (!filled) break;
    }
    return moved;
  }

  // The points by cluster, each cluster's in their order.
  void sort_members() {
    offsets_.assign(static_cast<size_t>(p_.num_clusters) + 1, 0);
    for (const int32_t label : labels_) ++offsets_[static_cast<size_t>(label) + 1];
    for (size_t c = 1; c < offsets_.size(); ++c) offsets_[c] += offsets_[c - 1];
    std::vector<int64_t> next(offsets_.begin(), offsets_.end() - 1);
    members_.resize(labels_.size());
    for (size_t i = 0; i < labels_.size(); ++i) {
      members_[static_cast<size_t>(next[static_cast<size_t>(labels_[i])]++)] =
          static_cast<int64_t>(i);
    }
  }

  struct Row {
    std::vector<double> sum;  // [dim]
    std::vector<double> run;  // [dim]
    std::vector<T> mean;      // [dim]
  };

  // The mean of the members' rows, 0 without members; returns how many keys they stand for.
  template <class Rows>
  int64_t mean_of(int64_t cluster, const Rows& rows, Row& row) const {
    std::fill(row.sum.begin(), row.sum.end(), 0.0);
    int64_t weight = 0;
    const int64_t begin = offsets_[static_cast<size_t>(cluster)];
    const int64_t end = offsets_[static_cast<size_t>(cluster) + 1];
    const int64_t length = member_run(end - begin);
    for (int64_t first = begin; first < end; first += length) {
      std::fill(row.run.begin(), row.run.end(), 0.0);
      for (int64_t m = first; m < std::min(first + length, end); ++m) {
        const int64_t i = members_[static_cast<size_t>(m)];
        const auto* from = rows(i);
        const auto factor = static_cast<double>(weights_[static_cast<size_t>(i)]);
        double* run = row.run.data();
        for (int64_t d = 0; d < p_.dim; ++d) run[d] += factor * widen(from[d]);
        weight += weights_[static_cast<size_t>(i)];
      }
      for (size_t d = 0; d < row.sum.size(); ++d) row.sum[d] += row.run[d];
    }
    const double divisor = weight > 0 ? static_cast<double>(weight) : 1.0;
    for (size_t d = 0; d < row.sum.size(); ++d) row.mean[d] = static_cast<T>(row.sum[d] / divisor);
    return weight;
  }

  // Calls work(cluster, row) on every cluster.
  template <class Work>
  void for_each_cluster(const Work& work) const {
    const auto dim = static_cast<size_t>(p_.dim);
    for_each_item(
        num_panels_,
        [&] {
          return Row{std::vector<double>(dim), std::vector<double>(dim), std::vector<T>(dim)};
        },
        [&](int64_t panel, Row& row) {
          const int64_t end = std::min((panel + 1) * kernels_.panel, p_.num_clusters);
          for (int64_t c = panel * kernels_.panel; c < end; ++c) work(c, row);
        });
  }

  // A cluster without members keeps its centroid, if it has one.
  void update_centroids() {
    sort_members();
    for_each_cluster([&](int64_t c, Row& row) {
      if (mean_of(c, [&](int64_t i) { return point(i); }, row) > 0)
        put_centroid(c, row.mean.data());
    });
  }

  // Centroids are means of the rows as they were given.
  void write_result(int64_t batch, int64_t head) {
    sort_members();
    const int64_t index = batch * p_.heads + head;
    for_each_cluster([&](int64_t c, Row& row) {
      const auto rows = [&](int64_t i) { return key(batch, head, rows_[static_cast<size_t>(i)]); };
      const int64_t weight = mean_of(c, rows, row);
      In* centroid = static_cast<In*>(p_.centroids) + (index * p_.num_clusters + c) * p_.dim;
      for (int64_t d = 0; d < p_.dim; ++d) narrow(row.mean[static_cast<size_t>(d)], centroid[d]);
      p_.cluster_counts[index * p_.num_clusters + c] =
          static_cast<int32_t>(std::min<int64_t>(weight, std::numeric_limits<int32_t>::max()));
    });
    int32_t* labels = p_.labels + index * p_.n;
    std::fill(labels, labels + p_.n, -1);
    for (size_t i = 0; i < rows_.size(); ++i) labels[rows_[i]] = labels_[i];
  }

  const KMeansParams& p_;
  const NearestKernels<T>& kernels_;
  int64_t num_panels_;
  std::vector<T> panels_, biases_;  // as NearestKernels wants them
  std::vector<int32_t> rows_;       // [points]: those of the keys that exist
  std::vector<int64_t> weights_;    // [points]: keys that a point stands for
  std::vector<T> points_;           // [points][dim]
  std::vector<T> squares_;          // [points]: |x|^2
  std::vector<T> best_;             // [points]: score of the nearest centroid
  std::vector<int32_t> labels_;     // [points]: its number
  std::vector<int32_t> sizes_;      // [num_clusters]: points
  std::vector<int64_t> offsets_;    // [num_clusters + 1] into members_
  std::vector<int64_t> members_;    // [points], by cluster
};

}  // namespace

void run_kmeans_cpu(const KMeansParams& params) {
  switch (params.dtype) {
    case DType::kFloat32:
      return KMeans<float, float>(params).run();
    case DType::kFloat64:
      return KMeans<double, double>(params).run();
    case DType::kBFloat16:
      return KMeans<float, BFloat16>(params).run();
    case DType::kFloat16:
      return KMeans<float, Float16>(params).run();
  }
}

}  // namespace longctx::cpu
