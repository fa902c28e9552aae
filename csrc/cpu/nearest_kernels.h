// The nearest of many centroids to each of many points: a product that is never stored, and its
// row maxima. One implementation, compiled for each instruction set.
#pragma once
#include <cstdint>

#include "strip_engine.h"

namespace longctx::cpu {

constexpr int64_t kNearestRows = 240;  // points of a call: they stay in the L2 cache

// Centroids c stand in panels, [num_panels][dim][panel], beside their biases, [num_panels][panel]:
// -|c|^2 / 2, or -inf for a column that holds none. The score of a centroid is x . c + bias, half
// of |x|^2 - |x - c|^2: the highest is the nearest.
template <class T>
struct NearestKernels {
  int64_t panel;  // centroids of a panel
  // For `rows` <= kNearestRows points [dim]: where a centroid scores higher than `best`, the first
  // of the highest replaces it; column i of the panels is centroid `first` + i, at most
  // 2^24, which floats count to. `work` holds
  // 2 * kNearestRows * panel numbers.
  void (*nearest)(const T* points, int64_t rows, int64_t dim, const T* panels, const T* biases,
                  int64_t num_panels, int64_t first, T* work, T* best, int32_t* labels);
};

const NearestKernels<double>& generic_nearest_kernels(double);
const NearestKernels<float>& generic_nearest_kernels(float);
const NearestKernels<float>& avx2_nearest_kernels();
const NearestKernels<float>& avx512_nearest_kernels();

inline const NearestKernels<double>& choose_nearest_kernels(Isa, double) {
  return generic_nearest_kernels(0.0);
}

inline const NearestKernels<float>& choose_nearest_kernels(Isa isa, float) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return avx512_nearest_kernels();
  if (isa >= Isa::kAvx2) return avx2_nearest_kernels();
#endif
  (void)isa;
  return generic_nearest_kernels(0.0f);
}

}  // namespace longctx::cpu
