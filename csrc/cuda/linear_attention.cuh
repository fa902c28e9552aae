// linear_attention on tensor cores (Lightning Attention-2, Qin et al., 2024): a block walks the
// chunks of its item. Four warps own kColumns / 4 columns of v each: of the state, which stays in
// registers, and of the rows. Accumulators of the transposed state [columns, head_dim] stand where
// a product takes its second operand from, so that q s needs no way through memory.
//
//   Q has one buffer; K, V (one with head_dim 256) and the weights have two. In step i, between
//   barriers:
//   A   Q, K, V and weights i are there, and every warp is done with step i-1
//       start K, V i+1     p = weights * q k^T, a quarter of the rows each     warp 0: weights i+1
//   B   p is there
//       acc = weights * q s
//   C   every warp has read Q i
//       start Q i+1        acc += p v, write out     s = carry * s + (weights * v)^T k
//
// docs/cuda.md counts what a step costs.
#pragma once
#include <type_traits>

#include "cuda/fragments.cuh"
#include "cuda/linear_attention.h"
#include "cuda/linear_operands.cuh"
#include "cuda/linear_weights.cuh"
#include "cuda/runtime.h"

namespace longctx::cuda {

constexpr int kLinearWarps = 4;
constexpr int kLinearThreads = kLinearWarps * device::kWarpSize;

// What a launch hands to the kernel beside the params.
struct LinearLaunch {
  LinearPass pass;
  SourceRows q, k, v;
  bool out_aligned = false;  // rows of out may be written 16 bytes at a time
};

// What a block works on. In shared memory, so that it takes no registers while the products run.
struct alignas(16) LinearTask {
  LinearItem item;
  const uint16_t* q;  // [head_dim], the first row of the sequence
  const uint16_t* k;  // [head_dim]
  const uint16_t* v;  // the item's columns
  char* out;          // the item's columns
};

template <int kHeadDim, int kColumns>
struct LinearShared {
  static constexpr int kStages = kHeadDim <= 128 ? 2 : 1;  // of K and V
  static constexpr int kTokens = kLinearChunk;
  static constexpr int kQ = 0;  // [kTokens, kHeadDim]
  static constexpr int kK = kQ + kTokens * TileRows<kHeadDim>::kRowBytes;
  static constexpr int kKBytes = kTokens * TileRows<kHeadDim>::kRowBytes;
  static constexpr int kV = kK + kStages * kKBytes;  // [kTokens, kColumns]
  static constexpr int kVBytes = kTokens * TileRows<kColumns>::kRowBytes;
  static constexpr int kP = kV + kStages * kVBytes;  // [kTokens, kTokens]
  static constexpr int kWeights = kP + kTokens * TileRows<kTokens>::kRowBytes;  // [2]
  static constexpr int kDecay = kWeights + 2 * sizeof(LinearWeights);
  static constexpr int kTask = kDecay + sizeof(LinearDecay);
  static constexpr int kKeySums = kTask + sizeof(LinearTask);           // [kHeadDim] float
  static constexpr int kRowSums = kKeySums + kHeadDim * sizeof(float);  // [kTokens] float
  static constexpr int kRowUnits = kRowSums + kTokens * sizeof(float);  // [kTokens] float
  static constexpr int kBytes = kRowUnits + kTokens * sizeof(float);
  static_assert(kBytes <= 99 * 1024);

  char* base = device::shared_memory();
  LONGCTX_DEVICE LinearWeights& weights(int parity) const {
    return reinterpret_cast<LinearWeights*>(base + kWeights)[parity];
  }
  LONGCTX_DEVICE LinearDecay& decay() const {
    return *reinterpret_cast<LinearDecay*>(base + kDecay);
  }
  LONGCTX_DEVICE LinearTask& task() const { return *reinterpret_cast<LinearTask*>(base + kTask); }
  // With normalize: the sum of keys, the last column of the state; and those of the rows.
  LONGCTX_DEVICE float* key_sums() const { return reinterpret_cast<float*>(base + kKeySums); }
  LONGCTX_DEVICE float* row_sums() const { return reinterpret_cast<float*>(base + kRowSums); }
  // A row of p stands in units of this.
  LONGCTX_DEVICE float* row_units() const { return reinterpret_cast<float*>(base + kRowUnits); }
};

template <class T, int kHeadDim, int kColumns>
class LinearBlock {
 public:
  LONGCTX_DEVICE LinearBlock(const LinearAttentionParams& p, const LinearLaunch& launch)
      : p_(p), launch_(launch), pass_(launch.pass), warp_(device::warp_index()) {}

  LONGCTX_DEVICE void run() {
    if (warp_ == 0) find_task();
    device::sync_threads();
    const LinearItem& item = shared_.task().item;
    LinearWeigher weigher(p_, pass_, item, shared_.decay());
    const int num_chunks = static_cast<int>(item.num_chunks);
    if (warp_ == 0) {
      weigher.begin();
      if (num_chunks > 0) {
        weigher.fetch(item.chunk(pass_, 0));
        weigher.weigh(item.chunk(pass_, 0), shared_.weights(0));
      }
      if (num_chunks > 1) weigher.fetch(item.chunk(pass_, 1));
    }
    if (num_chunks > 0) {
      copy_q(item.chunk(pass_, 0));
      copy_keys_and_values(item.chunk(pass_, 0), 0);
    }
    device::commit_copies();
    load_state();

    // for each chunk
#pragma unroll 1
    for (int step = 0; step < num_chunks; ++step) {
      const int64_t chunk = item.chunk(pass_, step), next = item.chunk(pass_, step + 1);
      const int stage = step % Shared::kStages;
      const bool more = step + 1 < num_chunks;
      const bool rows = pass_.rows && item.num_rows(chunk) > 0;
      const bool keys = pass_.keys && item.num_keys(chunk) > 0;
      const LinearWeights& weights = shared_.weights(step % 2);
      device::wait_copies<0>();
      device::sync_threads();  // A
      if (more && Shared::kStages == 2) copy_keys_and_values(next, stage ^ 1);
      if (more && !rows) copy_q(next);
      device::commit_copies();
      if (rows) attend_keys(weights, chunk, keys, stage);
      if (warp_ == 0 && more) {
        weigher.weigh(next, shared_.weights((step + 1) % 2));
        if (step + 2 < num_chunks) weigher.fetch(item.chunk(pass_, step + 2));
      }
      if (rows) {
        device::sync_threads();  // B
#pragma unroll 1
        for (int part = 0; part < kParts; ++part) {
          float acc[kRowTiles][2 * kColumnTiles][4];
          attend_state(weights, part, acc);
          if (part == kParts - 1) {
            device::sync_threads();  // C
            if (more) copy_q(next);
            device::commit_copies();
          }
          if (keys && pass_.pairs != LinearPairs::kNone) add_values(part, stage, acc);
          write_rows(chunk, part, acc);
        }
      }
      if (keys) update_state(weights, stage);
      if (pass_.chunk_states != nullptr && item.chunk_row + chunk < p_.num_chunks) {
        const int64_t map = item.seq.batch_index * p_.num_q_heads + item.head;
        store_state(pass_.chunk_states +
                    (map * p_.num_chunks + item.chunk_row + chunk) * state_size());
      }
      if (more && Shared::kStages == 1) {
        device::sync_threads();  // every warp has read K and V i
        copy_keys_and_values(next, 0);
        device::commit_copies();
      }
    }
    write_last_state(weigher);
  }

 private:
  using Shared = LinearShared<kHeadDim, kColumns>;
  static constexpr int kWarpColumns = kColumns / kLinearWarps;
  static constexpr int kColumnTiles = kWarpColumns / 16;
  // Rows are worked on in parts whose accumulators fit beside those of the state.
  static constexpr int kParts = kColumnTiles;
  static constexpr int kRowTiles = kLinearChunk / 16 / kParts;
  static constexpr bool kHalf = std::is_same_v<T, __half>;

  LONGCTX_DEVICE void find_task() {
    const LinearItem item = linear_item_at(p_, pass_, device::block_index());
    if (device::lane_index() > 0) return;
    LinearTask& task = shared_.task();
    task.item = item;
    task.q = row_of(p_.q, item, item.head, item.seq.q_begin);
    task.k = row_of(p_.k, item, item.kv_head, item.seq.k_begin);
    task.v = row_of(p_.v, item, item.kv_head, item.seq.k_begin) + item.first_column;
    const TensorView& out = pass_.out;
    task.out = static_cast<char*>(out.data) +
               (item.seq.batch_index * out.batch_stride + item.head * out.head_stride +
                item.seq.q_begin * out.seq_stride + item.first_column) *
                   (pass_.wide_out ? 4 : 2);
  }
  LONGCTX_DEVICE static const uint16_t* row_of(const TensorView& view, const LinearItem& item,
                                               int64_t head, int64_t row) {
    return static_cast<const uint16_t*>(view.data) + item.seq.batch_index * view.batch_stride +
           head * view.head_stride + row * view.seq_stride;
  }

  LONGCTX_DEVICE void copy_q(int64_t chunk) const {
    const LinearTask& task = shared_.task();
    const int rows = task.item.num_rows(chunk);
    if (!pass_.rows || rows == 0) return;
    copy_rows<kHeadDim, kLinearThreads, kLinearChunk>(
        shared_.base + Shared::kQ, task.q + chunk * kLinearChunk * p_.q.seq_stride, launch_.q,
        launch_.q.dim, [rows](int row) { return row < rows ? row : -1; });
  }
  LONGCTX_DEVICE void copy_keys_and_values(int64_t chunk, int stage) const {
    const LinearTask& task = shared_.task();
    const int keys = task.item.num_keys(chunk);
    if (!pass_.keys || keys == 0) return;
    const auto position = [keys](int row) { return row < keys ? row : -1; };
    copy_rows<kHeadDim, kLinearThreads, kLinearChunk>(
        shared_.base + Shared::kK + stage * Shared::kKBytes,
        task.k + chunk * kLinearChunk * p_.k.seq_stride, launch_.k, launch_.k.dim, position);
    copy_rows<kColumns, kLinearThreads, kLinearChunk>(
        shared_.base + Shared::kV + stage * Shared::kVBytes,
        task.v + chunk * kLinearChunk * p_.v.seq_stride, launch_.v,
        launch_.v.dim - static_cast<int>(task.item.first_column), position);
  }

  // Whether rows [16 row_tile, + 16) of a chunk see any of its keys [16 key_tile, + 16).
  LONGCTX_DEVICE bool tile_sees(int row_tile, int key_tile) const {
    return pass_.pairs == LinearPairs::kUpToRow   ? key_tile <= row_tile
           : pass_.pairs == LinearPairs::kFromRow ? key_tile >= row_tile
                                                  : true;
  }
  LONGCTX_DEVICE bool sees(int row, int key) const {
    return pass_.pairs == LinearPairs::kUpToRow   ? key <= row
           : pass_.pairs == LinearPairs::kFromRow ? key >= row
                                                  : true;
  }

  // p = weights * q k^T of the warp's 16 rows; with normalize, the sums of their weights.
  LONGCTX_DEVICE void attend_keys(const LinearWeights& weights, int64_t chunk, bool keys,
                                  int stage) const {
    float row_sums[2] = {0, 0};
    if (keys && pass_.pairs != LinearPairs::kNone) {
      float s[kLinearChunk / 8][4];
#pragma unroll
      for (int n = 0; n < kLinearChunk / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] = 0;
      }
      const MatrixLane<kHeadDim> q_lane(shared_.base, true), k_lane(shared_.base, false);
      const int k_offset = Shared::kK + stage * Shared::kKBytes;
#pragma unroll
      for (int step = 0; step < kHeadDim / 16; ++step) {
        uint32_t a[4];
        device::load_matrices(a, q_lane.at(Shared::kQ, 16 * warp_, step));
#pragma unroll
        for (int n = 0; n < kLinearChunk / 8; n += 2) {
          if (!tile_sees(warp_, n / 2)) continue;
          uint32_t b[4];
          device::load_matrices(b, k_lane.at(k_offset, 8 * n, step));
          device::multiply_add(T(), s[n], a, b[0], b[1]);
          device::multiply_add(T(), s[n + 1], a, b[2], b[3]);
        }
      }
      weigh_pairs(weights, s);
      store_pairs(s, row_sums);
    } else if (kHalf && device::lane_index() < 16) {
      shared_.row_units()[16 * warp_ + device::lane_index()] = 1.0f;
    }
    if (p_.normalize) sum_row_weights(weights, chunk, row_sums);
  }

  LONGCTX_DEVICE void weigh_pairs(const LinearWeights& weights,
                                  float (&s)[kLinearChunk / 8][4]) const {
    const bool per_token = p_.log_decay.per_token;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * warp_ + own_row(0, half);
      const float2 row_sum = per_token ? weights.sums[row] : float2{0, 0};
#pragma unroll
      for (int n = 0; n < kLinearChunk / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int key = own_column(n) + i;
          const float weight = per_token ? pair_weight(row_sum, weights.sums[key])
                                         : pair_weight(shared_.decay(), row, key);
          float& value = s[n][2 * half + i];
          value = sees(row, key) ? value * weight : 0.0f;
        }
      }
    }
  }

  // Rounds the warp's rows of p on their way to all warps.
  LONGCTX_DEVICE void store_pairs(const float (&s)[kLinearChunk / 8][4],
                                  float (&row_sums)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * warp_ + own_row(0, half);
      float unit = 1.0f, largest = 0;
#pragma unroll
      for (int n = 0; n < kLinearChunk / 8; ++n) {
        row_sums[half] += s[n][2 * half] + s[n][2 * half + 1];
        if (kHalf) {
          largest = fmaxf(largest, fmaxf(fabsf(s[n][2 * half]), fabsf(s[n][2 * half + 1])));
        }
      }
      if (kHalf) {
        unit = half_unit(quad_max(largest));
        if (device::lane_index() % 4 == 0) shared_.row_units()[row] = unit;
      }
      const float factor = kHalf ? 1.0f / unit : 1.0f;
#pragma unroll
      for (int n = 0; n < kLinearChunk / 8; ++n) {
        const uint32_t pair =
            device::pack_pair(T(), s[n][2 * half] * factor, s[n][2 * half + 1] * factor);
        *reinterpret_cast<uint32_t*>(shared_.base + Shared::kP +
                                     TileRows<kLinearChunk>::offset(row, n) +
                                     device::lane_index() % 4 * 4) = pair;
      }
    }
  }

  // The sums of the weights of the warp's rows: of p, and q times the sum of keys in the state.
  LONGCTX_DEVICE void sum_row_weights(const LinearWeights& weights, int64_t chunk,
                                      const float (&pair_sums)[2]) const {
    float* sums = shared_.row_sums() + 16 * warp_;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(pair_sums[half]);
      if (device::lane_index() % 4 == 0) sums[own_row(0, half)] = sum;
    }
    device::sync_warp();
    const int own = device::lane_index() % 16, row = 16 * warp_ + own;
    const int first = device::lane_index() / 16 * (kHeadDim / 2);
    float dot = 0;
#pragma unroll 1
    for (int d = first; d < first + kHeadDim / 2; d += kChunk) {
      const auto& q = *reinterpret_cast<const Chunk*>(shared_.base + Shared::kQ +
                                                      TileRows<kHeadDim>::offset(row, d / kChunk));
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        dot += widen_bits16(T(), q.elements[i]) * shared_.key_sums()[d + i];
      }
    }
    dot += device::shuffle_xor(dot, 16);
    if (device::lane_index() >= 16) return;
    const float weight = weights.rows[row];
    float sum = sums[own] + (weight == 0 ? 0.0f : weight * dot);
    const LinearItem& item = shared_.task().item;
    if (row < item.num_rows(chunk)) {
      const int64_t index = item.row_index(p_, chunk * kLinearChunk + row);
      if (pass_.more_sums != nullptr) sum += pass_.more_sums[index];
      if (pass_.sums != nullptr && item.first_column == 0) pass_.sums[index] = sum;
    }
    sums[own] = sum;
  }

  // acc = weights * q s, of the rows of `part`, in units of p.
  LONGCTX_DEVICE void attend_state(const LinearWeights& weights, int part,
                                   float (&acc)[kRowTiles][2 * kColumnTiles][4]) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < 2 * kColumnTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[m][n][i] = 0;
      }
    }
    if (state_is_zero_) return;
    const float unit = kHalf ? half_unit(largest_of_state()) : 1.0f;
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
          const float (&tile)[4] = state_[c][2 * step + i % 2];
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
        if (kHalf) weight *= state_unit_ * unit / row_unit(row);
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

  LONGCTX_DEVICE float row_unit(int row) const { return kHalf ? shared_.row_units()[row] : 1.0f; }

  LONGCTX_DEVICE float largest_of_state() const {
    float largest = 0;
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) largest = fmaxf(largest, fabsf(state_[c][n][i]));
      }
    }
    for (int mask = device::kWarpSize / 2; mask > 0; mask /= 2) {
      largest = fmaxf(largest, device::shuffle_xor(largest, mask));
    }
    return largest;
  }

  // The warp's columns of V, 16 keys from 16 * step on, transposed: as the first operand [columns,
  // keys]; and, two registers a column tile, as the second operand [keys, columns].
  LONGCTX_DEVICE void load_values(int stage, int step, uint32_t (&values)[kColumnTiles][4]) const {
    const MatrixLane<kColumns> v_lane(shared_.base, false);
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
      device::load_matrices_transposed(values[c], v_lane.at(Shared::kV + stage * Shared::kVBytes,
                                                            16 * step, warp_ * kColumnTiles + c));
    }
  }

  // acc += p v.
  LONGCTX_DEVICE void add_values(int part, int stage,
                                 float (&acc)[kRowTiles][2 * kColumnTiles][4]) const {
    const MatrixLane<kLinearChunk> p_lane(shared_.base, true);
#pragma unroll
    for (int step = 0; step < kLinearChunk / 16; ++step) {
      uint32_t values[kColumnTiles][4];
      load_values(stage, step, values);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        if (!tile_sees(part * kRowTiles + m, step)) continue;
        uint32_t a[4];
        device::load_matrices(a, p_lane.at(Shared::kP, 16 * (part * kRowTiles + m), step));
#pragma unroll
        for (int c = 0; c < kColumnTiles; ++c) {
          device::multiply_add(T(), acc[m][2 * c], a, values[c][0], values[c][2]);
          device::multiply_add(T(), acc[m][2 * c + 1], a, values[c][1], values[c][3]);
        }
      }
    }
  }

  // s = carry * s + (weights * v)^T k.
  LONGCTX_DEVICE void update_state(const LinearWeights& weights, int stage) {
    scale_state(kHalf ? weights.carry * state_unit_ : weights.carry);
    state_unit_ = weights.unit;
    const MatrixLane<kHeadDim> k_lane(shared_.base, true);
    const int k_offset = Shared::kK + stage * Shared::kKBytes;
#pragma unroll
    for (int step = 0; step < kLinearChunk / 16; ++step) {
      uint32_t values[kColumnTiles][4];
      load_values(stage, step, values);
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
          device::multiply_add(T(), state_[c][n], values[c], b[0], b[1]);
          device::multiply_add(T(), state_[c][n + 1], values[c], b[2], b[3]);
        }
      }
    }
    state_is_zero_ = false;
    if (p_.normalize) update_key_sums(weights, k_offset);
  }

  // A factor of 0 forgets, whatever was there.
  LONGCTX_DEVICE void scale_state(float factor) {
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          state_[c][n][i] = factor == 0 ? 0.0f : state_[c][n][i] * factor;
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

  // Visits the lane's elements of the state: visit(element, its place in [head_dim, state_dim]).
  template <class Visit>
  LONGCTX_DEVICE void for_each_state(const Visit& visit) {
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
            visit(state_[c / 2][n][c % 2 * 2 + i], d * state_dim + column + 8 * c);
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
  LONGCTX_DEVICE int64_t state_size() const { return p_.head_dim * p_.state_dim(); }

  LONGCTX_DEVICE void load_state() {
    const LinearItem& item = shared_.task().item;
    state_is_zero_ = pass_.starts == nullptr;
    const float* from = nullptr;
    if (!state_is_zero_) {
      const int64_t segment = pass_.start_stride > 1 ? item.segment : 0;
      from = pass_.starts + (item.map(p_) * pass_.start_stride + segment) * state_size();
    }
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) state_[c][n][i] = 0;
      }
    }
    if (from != nullptr) for_each_state([from](float& element, int at) { element = from[at]; });
    for_each_key_sum([this, from](float& sum, int d, int at) {
      sum = from != nullptr && d < p_.head_dim ? from[at] : 0.0f;
    });
  }

  LONGCTX_DEVICE void store_state(float* to) {
    const float unit = kHalf ? state_unit_ : 1.0f;
    for_each_state([to, unit](const float& element, int at) { to[at] = element * unit; });
    if (shared_.task().item.first_column > 0) return;
    for_each_key_sum([this, to](const float& sum, int d, int at) {
      if (d < p_.head_dim) to[at] = sum;
    });
  }

  LONGCTX_DEVICE void write_last_state(const LinearWeigher& weigher) {
    const LinearItem& item = shared_.task().item;
    float* to = nullptr;
    if (pass_.local_states != nullptr) {
      to = pass_.local_states + (item.map(p_) * pass_.num_segments + item.segment) * state_size();
      if (warp_ == 0 && item.first_column == 0) weigher.write_carry();
    } else if (pass_.final_state != nullptr && item.segment == pass_.num_segments - 1) {
      to = pass_.final_state + item.map(p_) * state_size();
    }
    if (to != nullptr) store_state(to);
  }

  // write out
  LONGCTX_DEVICE void write_rows(int64_t chunk, int part,
                                 float (&acc)[kRowTiles][2 * kColumnTiles][4]) const {
    const LinearTask& task = shared_.task();
    const int num_rows = task.item.num_rows(chunk);
    const int num_columns = static_cast<int>(p_.head_dim_v - task.item.first_column);
    const int64_t first = chunk * kLinearChunk;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = part * kRowTiles * 16 + own_row(m, half);
        const float unit = row_unit(row);
        float scale = 1.0f;
        if (!pass_.raw_out) {
          scale = static_cast<float>(p_.scale);
          if (p_.normalize) scale /= shared_.row_sums()[row] + static_cast<float>(p_.eps);
        }
        const float* more = nullptr;
        if (pass_.more != nullptr && row < num_rows) {
          more = pass_.more + task.item.row_index(p_, first + row) * p_.head_dim_v +
                 task.item.first_column;
        }
#pragma unroll
        for (int n = 0; n < 2 * kColumnTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& value = acc[m][n][2 * half + i];
            const int column = warp_ * kWarpColumns + own_column(n) + i;
            value *= unit;
            if (more != nullptr && column < num_columns) value += more[column];
            value *= scale;
          }
        }
      }
    }
    const int64_t stride = pass_.out.seq_stride;
    const int first_row = part * kRowTiles * 16;
    if (pass_.wide_out) {
      float* out = reinterpret_cast<float*>(task.out) + (first + first_row) * stride;
      store_wide_rows(acc, out + warp_ * kWarpColumns, stride, num_rows - first_row,
                      num_columns - warp_ * kWarpColumns, launch_.out_aligned);
    } else {
      uint16_t* out = reinterpret_cast<uint16_t*>(task.out) + (first + first_row) * stride;
      store_rounded_rows(T(), acc, out + warp_ * kWarpColumns, stride, num_rows - first_row,
                         num_columns - warp_ * kWarpColumns, launch_.out_aligned);
    }
  }

  const LinearAttentionParams& p_;
  const LinearLaunch& launch_;
  const LinearPass& pass_;
  const Shared shared_;
  const int warp_;
  // The warp's columns of the state, transposed: accumulators [columns, head_dim].
  float state_[kColumnTiles][kHeadDim / 8][4];
  float state_unit_ = 1;  // what float16 keeps of it is a multiple of this
  bool state_is_zero_ = true;
};

// Blocks that should share a multiprocessor.
template <int kHeadDim, int kColumns>
constexpr int kLinearMinBlocks = kHeadDim * kColumns <= 64 * 64 ? 3 : 2;

template <class T, int kHeadDim, int kColumns>
LONGCTX_KERNEL(kLinearThreads, (kLinearMinBlocks<kHeadDim, kColumns>))
linear_attention_kernel(const LONGCTX_GRID_CONSTANT LinearAttentionParams p,
                        const LONGCTX_GRID_CONSTANT LinearLaunch launch) {
  LinearBlock<T, kHeadDim, kColumns>(p, launch).run();
}

template <class T, int kHeadDim, int kColumns>
void launch_linear_tile(const LinearAttentionParams& p, const LinearPass& pass) {
  LinearLaunch launch_params;
  launch_params.pass = pass;
  launch_params.pass.key_units = std::is_same_v<T, __half>;
  launch_params.q = source_rows(p.q, p.head_dim, kChunk);
  launch_params.k = source_rows(p.k, p.head_dim, kChunk);
  launch_params.v = source_rows(p.v, p.head_dim_v, kChunk);
  launch_params.out_aligned =
      source_rows(pass.out, p.head_dim_v, pass.wide_out ? kChunk / 2 : kChunk).aligned;
  launch(pass.op, &linear_attention_kernel<T, kHeadDim, kColumns>,
         dim3(static_cast<unsigned>(num_items(p, pass))), kLinearThreads,
         LinearShared<kHeadDim, kColumns>::kBytes, p, launch_params);
}

template <class T, int head_dim>
void launch_linear_attention(const LinearAttentionParams& params, const LinearPass& pass) {
  if constexpr (head_dim == 128) {
    if (pass.slice_columns == 128) return launch_linear_tile<T, 128, 128>(params, pass);
  }
  launch_linear_tile<T, head_dim, 64>(params, pass);
}

template <class T, int head_dim>
int64_t linear_attention_shared_bytes() {
  return LinearShared < head_dim, head_dim == 128 ? 128 : 64 > ::kBytes;
}

}  // namespace longctx::cuda
