// out = sum_i w_i out_i with w = softmax over the states of their lse; lse = logsumexp of them.
// A state whose lse is -inf saw no key and is not read.
#include <math.h>

#include <cstdint>
#include <limits>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "reduced_float.h"

namespace longctx::cpu {
namespace {

constexpr int64_t kColumns = 256;           // output columns accumulated at a time, in L1
constexpr int64_t kItemElements = 1 << 16;  // output elements of a work item

template <class T, class In>
struct MergeStates {
  const MergeStatesParams& params;
  static constexpr T kInf = std::numeric_limits<T>::infinity();

  // weights: [num_states], normalised; returns the merged lse.
  T state_weights(int64_t row, T* weights) const {
    const void* source = params.lse_override != nullptr ? params.lse_override : params.lse;
    const T* lse = static_cast<const T*>(source) + row;
    T top = -kInf;
    for (int64_t s = 0; s < params.num_states; ++s) {
      weights[s] = lse[s * params.rows];
      top = weights[s] > top ? weights[s] : top;
    }
    const T safe_top = top == -kInf ? T(0) : top;
    T sum = 0;
    for (int64_t s = 0; s < params.num_states; ++s) {
      weights[s] = weights[s] == -kInf ? T(0) : exp_of(weights[s] - safe_top);
      sum += weights[s];
    }
    if (sum == 0) return -kInf;
    for (int64_t s = 0; s < params.num_states; ++s) weights[s] /= sum;
    return safe_top + log_of(sum);
  }

  void merge_row(int64_t row, T* weights) const {
    static_cast<T*>(params.merged_lse)[row] = state_weights(row, weights);
    const void* source = params.lse_override != nullptr ? params.lse_override : params.lse;
    const T* lse = static_cast<const T*>(source) + row;
    for (int64_t begin = 0; begin < params.dim; begin += kColumns) {
      const int64_t count = params.dim - begin < kColumns ? params.dim - begin : kColumns;
      T acc[kColumns] = {};
      for (int64_t s = 0; s < params.num_states; ++s) {
        if (lse[s * params.rows] == -kInf) continue;
        const In* out =
            static_cast<const In*>(params.out) + (s * params.rows + row) * params.dim + begin;
        const T weight = weights[s];
        for (int64_t d = 0; d < count; ++d) acc[d] += weight * widen(out[d]);
      }
      In* merged = static_cast<In*>(params.merged_out) + row * params.dim + begin;
      for (int64_t d = 0; d < count; ++d) narrow(acc[d], merged[d]);
    }
  }

  void run() const {
    const int64_t dim = params.dim > 0 ? params.dim : 1;
    const int64_t rows_per_item = dim < kItemElements ? kItemElements / dim : 1;
    for_each_item((params.rows + rows_per_item - 1) / rows_per_item,
                  [&] { return std::vector<T>(static_cast<size_t>(params.num_states)); },
                  [&](int64_t item, std::vector<T>& weights) {
                    const int64_t begin = item * rows_per_item;
                    const int64_t last = begin + rows_per_item;
                    const int64_t end = last < params.rows ? last : params.rows;
                    for (int64_t row = begin; row < end; ++row) merge_row(row, weights.data());
                  });
  }

  static float exp_of(float x) { return ::expf(x); }
  static double exp_of(double x) { return ::exp(x); }
  static float log_of(float x) { return ::logf(x); }
  static double log_of(double x) { return ::log(x); }
};

}  // namespace

void run_merge_states_cpu(const MergeStatesParams& params) {
  switch (params.dtype) {
    case DType::kFloat32:
      return MergeStates<float, float>{params}.run();
    case DType::kFloat64:
      return MergeStates<double, double>{params}.run();
    case DType::kBFloat16:
      return MergeStates<float, BFloat16>{params}.run();
    case DType::kFloat16:
      return MergeStates<float, Float16>{params}.run();
  }
}

}  // namespace longctx::cpu
