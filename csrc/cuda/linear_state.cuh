// The state of linear_attention.cuh, in registers, and the products that read and change it.
#pragma once
#include "cuda/linear_operands.cuh"
#include "cuda/linear_tile.cuh"

namespace longctx::cuda {

// The warp's columns of V, 16 keys from 16 * step on, transposed: as the first operand [columns,
// keys]; and, two registers a column tile, as the second operand [keys, columns].
template <class Shared, int kColumns, int kColumnTiles>
LONGCTX_DEVICE void load_values(const Shared& shared, int stage, int step, int warp,
                                uint32_t (&values)[kColumnTiles][4]) {
  const MatrixLane<kColumns> v_lane(shared.base, false);
#pragma unroll
  for (int c = 0; c < kColumnTiles; ++c) {
    device::load_matrices_transposed(values[c], v_lane.at(Shared::kV + stage * Shared::kVBytes,
                                                          16 * step, warp * kColumnTiles + c));
  }
}

// The state of a block's columns. A warp holds its own quarter of them, transposed.
template <class T, int kHeadDim, int kColumns>
class LinearState {
 public:
  using Shared = LinearShared<kHeadDim, kColumns>;
  static constexpr int kWarpColumns = kColumns / kLinearWarps;
  static constexpr int kColumnTiles = kWarpColumns / 16;
  static constexpr bool kHalf = std::is_same_v<T, __half>;

  LONGCTX_DEVICE LinearState(const LinearAttentionParams& p, int warp) : p_(p), warp_(warp) {}

  // From [head_dim, state_dim]; null: zero.
  LONGCTX_DEVICE void load(const float* from) {
    is_zero_ = from == nullptr;
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) columns_[c][n][i] = 0;
      }
    }
    if (from != nullptr) for_each([from](float& element, int at) { element = from[at]; });
    for_each_key_sum([this, from](float& sum, int d, int at) {
      sum = from != nullptr && d < p_.head_dim ? from[at] : 0.0f;
    });
  }

  LONGCTX_DEVICE void store(float* to) {
    const float unit = kHalf ? unit_ : 1.0f;
    for_each([to, unit](const float& element, int at) { to[at] = element * unit; });
    if (shared_.task().item.first_column > 0) return;
    for_each_key_sum([this, to](const float& sum, int d, int at) {
      if (d < p_.head_dim) to[at] = sum;
    });
  }

  // acc = weights * q s, of the rows of `part`, in units of p.
  template <int kRowTiles>
  LONGCTX_DEVICE void attend(const LinearWeights& weights, int part,
                             float (&acc)[kRowTiles][2 * kColumnTiles][4]) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < 2 * kColumnTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[m][n][i] = 0;
      }
    }
    if (is_zero_) return;
    const float unit = kHalf ? half_unit(largest()) : 1.0f;
    const float factor = kHalf ? 1.0f / unit : 1.0f;
    const MatrixLane<kHeadDim> q_lane(shared_.base, true);
    const int first_row = part * kRowTiles * 16;
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      uint32_t b[kColumnTiles][4];
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float (&tile)[4] = columns_[c][2 * step + i % 2];
          b[c][i] = device::pack_pair(T(), tile[i / 2 * 2] * factor, tile[i / 2 * 2 + 1] * factor);
        }
      }
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        uint32_t a[4];
        device::load_matrices(a, q_lane.at(Shared::kQ, first_row + 16 * m, step));
#pragma unroll
        for (int c = 0; c < kColumnTiles; ++c) {
          device::multiply_add(T(), acc[m][2 * c], a, b[c][0], b[c][1]);
          device::multiply_add(T(), acc[m][2 * c + 1], a, b[c][2], b[c][3]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + own_row(m, half);
        float weight = weights.rows[row];
        // A weight of 0 forgets, whatever was there.
        const bool forgets = weight == 0;
        if (kHalf) weight *= unit_ * unit / shared_.row_units()[row];
#pragma unroll
        for (int n = 0; n < 2 * kColumnTiles; ++n) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            acc[m][n][i] = forgets ? 0.0f : acc[m][n][i] * weight;
          }
        }
      }
    }
  }

  // s = carry * s + (weights * v)^T k.
  LONGCTX_DEVICE void update(const LinearWeights& weights, int stage) {
    scale(kHalf ? weights.carry * unit_ : weights.carry);
    unit_ = weights.unit;
    const MatrixLane<kHeadDim> k_lane(shared_.base, true);
    const int k_offset = Shared::kK + stage * Shared::kKBytes;
#pragma unroll
    for (int step = 0; step < kLinearChunk / 16; ++step) {
      uint32_t values[kColumnTiles][4];
      load_values<Shared, kColumns>(shared_, stage, step, warp_, values);
      const int key = 16 * step + own_column(0);
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const float low = weights.keys[key + 4 * i], high = weights.keys[key + 4 * i + 1];
#pragma unroll
        for (int c = 0; c < kColumnTiles; ++c) {
          values[c][i] = weigh_pair(T(), values[c][i], low, high);
          values[c][i + 1] = weigh_pair(T(), values[c][i + 1], low, high);
        }
      }
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; n += 2) {
        uint32_t b[4];
        device::load_matrices_transposed(b, k_lane.at(k_offset, 16 * step, n / 2));
#pragma unroll
        for (int c = 0; c < kColumnTiles; ++c) {
          device::multiply_add(T(), columns_[c][n], values[c], b[0], b[1]);
          device::multiply_add(T(), columns_[c][n + 1], values[c], b[2], b[3]);
        }
      }
    }
    is_zero_ = false;
    if (p_.normalize) update_key_sums(weights, k_offset);
  }

 private:
  // A factor of 0 forgets, whatever was there.
  LONGCTX_DEVICE void scale(float factor) {
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          columns_[c][n][i] = factor == 0 ? 0.0f : columns_[c][n][i] * factor;
        }
      }
    }
  }

  // A thread owns two neighbouring ones.
  LONGCTX_DEVICE void update_key_sums(const LinearWeights& weights, int k_offset) const {
    const int d = 2 * device::thread_index();
    if (d >= kHeadDim) return;
    float sums[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sums[i] = weights.carry == 0 ? 0.0f : weights.carry * shared_.key_sums()[d + i];
    }
#pragma unroll 4
    for (int key = 0; key < kLinearChunk; ++key) {
      const auto* pair =
          reinterpret_cast<const uint16_t*>(shared_.base + k_offset +
                                            TileRows<kHeadDim>::offset(key, d / kChunk)) +
          d % kChunk;
#pragma unroll
      for (int i = 0; i < 2; ++i) sums[i] += weights.keys[key] * widen_bits16(T(), pair[i]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) shared_.key_sums()[d + i] = sums[i] * weights.unit;
  }

  LONGCTX_DEVICE float largest() const {
    float result = 0;
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) result = fmaxf(result, fabsf(columns_[c][n][i]));
      }
    }
    for (int mask = device::kWarpSize / 2; mask > 0; mask /= 2) {
      result = fmaxf(result, device::shuffle_xor(result, mask));
    }
    return result;
  }

  // Visits the lane's elements of the state: visit(element, its place in [head_dim, state_dim]).
  template <class Visit>
  LONGCTX_DEVICE void for_each(const Visit& visit) {
    const int state_dim = static_cast<int>(p_.state_dim());
    const int column = static_cast<int>(shared_.task().item.first_column) + warp_ * kWarpColumns +
                       device::lane_index() / 4;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int d = own_column(n) + i;
#pragma unroll
        for (int c = 0; c < 2 * kColumnTiles; ++c) {
          if (d < p_.head_dim && column + 8 * c < p_.head_dim_v) {
            visit(columns_[c / 2][n][c % 2 * 2 + i], d * state_dim + column + 8 * c);
          }
        }
      }
    }
  }
  template <class Visit>
  LONGCTX_DEVICE void for_each_key_sum(const Visit& visit) const {
    const int state_dim = static_cast<int>(p_.state_dim());
    const int own = 2 * device::thread_index();
    for (int d = own; p_.normalize && d < own + 2 && d < kHeadDim; ++d) {
      visit(shared_.key_sums()[d], d, d * state_dim + state_dim - 1);
    }
  }

  const LinearAttentionParams& p_;
  const Shared shared_;
  const int warp_;
  // Accumulators [columns, head_dim].
  float columns_[kColumnTiles][kHeadDim / 8][4];
  float unit_ = 1;  // what float16 keeps of it is a multiple of this
  bool is_zero_ = true;
};

}  // namespace longctx::cuda
