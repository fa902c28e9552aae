// A block of kBlockRows points times kBlockVecs vectors of centroids is kept in registers over the
// whole depth, and then only each lane's best is. A column is summed in the same order wherever it
// stands, so equal centroids score the same bits. Include after one vec_<isa>.h.
#pragma once
#include <limits>

#include "nearest_kernels.h"
#include "strip_products.h"

namespace longctx::cpu {
namespace {

template <class T>
struct NearestLoops {
  using V = Vec<T>;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kVecs = V::kBlockVecs;
  static constexpr int64_t kPanel = kVecs * kLanes;

  static void nearest(const T* points, int64_t rows, int64_t dim, const T* panels, const T* biases,
                      int64_t num_panels, int64_t first, T* work, T* best, int32_t* labels) {
    T* values = work;                           // [rows][kLanes]: each lane's best score
    T* numbers = work + kNearestRows * kLanes;  // [rows][kLanes]: its centroid
    const V nothing = V::broadcast(-std::numeric_limits<T>::infinity());
    for (int64_t i = 0; i < rows; ++i) {
      nothing.store(values + i * kLanes);
      V::broadcast(0).store(numbers + i * kLanes);
    }
    for (int64_t p = 0; p < num_panels; ++p) {
      const T* panel = panels + p * dim * kPanel;
      StripProducts<T>::for_each_block(rows, [&](auto count, int64_t row) {
        block<decltype(count)::value>(points + row * dim, dim, panel, biases + p * kPanel,
                                      static_cast<T>(first + p * kPanel), values + row * kLanes,
                                      numbers + row * kLanes);
      });
    }
    for (int64_t i = 0; i < rows; ++i) {
      const T* value = values + i * kLanes;
      const T* number = numbers + i * kLanes;
      int lane = 0;
      for (int j = 1; j < kLanes; ++j) {
        const bool better = value[j] > value[lane];
        const bool earlier = value[j] == value[lane] && number[j] < number[lane];
        lane = better || earlier ? j : lane;
      }
      if (!(value[lane] > best[i])) continue;
      best[i] = value[lane];
      labels[i] = static_cast<int32_t>(number[lane]);
    }
  }

 private:
  // Not inlined, or the accumulators compete with the caller for registers.
  template <int kRows>
  __attribute__((noinline)) static void block(const T* points, int64_t dim, const T* panel,
                                              const T* bias, T first, T* values, T* numbers) {
    V acc[kRows][kVecs];
#pragma GCC unroll 16
    for (int n = 0; n < kRows; ++n) {
#pragma GCC unroll 16
      for (int j = 0; j < kVecs; ++j) acc[n][j] = V::load(bias + j * kLanes);
    }
    const T* rows[kRows];
#pragma GCC unroll 16
    for (int n = 0; n < kRows; ++n) rows[n] = points + n * dim;
    for (int64_t d = 0; d < dim; ++d, panel += kPanel) {
      V c[kVecs];
#pragma GCC unroll 16
      for (int j = 0; j < kVecs; ++j) c[j] = V::load(panel + j * kLanes);
#pragma GCC unroll 16
      for (int n = 0; n < kRows; ++n) {
        const V x = V::broadcast(rows[n][d]);
#pragma GCC unroll 16
        for (int j = 0; j < kVecs; ++j) acc[n][j] = fma(x, c[j], acc[n][j]);
      }
    }
    T lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<T>(i);
    const V number = V::broadcast(first) + V::load(lanes);
#pragma GCC unroll 16
    for (int n = 0; n < kRows; ++n) {
      V value = V::load(values + n * kLanes), at = V::load(numbers + n * kLanes);
#pragma GCC unroll 16
      for (int j = 0; j < kVecs; ++j) {
        at = select_less(value, acc[n][j], number + V::broadcast(static_cast<T>(j * kLanes)), at);
        value = select_less(value, acc[n][j], acc[n][j], value);
      }
      value.store(values + n * kLanes);
      at.store(numbers + n * kLanes);
    }
  }
};

template <class T>
constexpr NearestKernels<T> kNearestKernels = {NearestLoops<T>::kPanel, NearestLoops<T>::nearest};

}  // namespace
}  // namespace longctx::cpu
