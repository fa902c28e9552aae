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
#include "cuda/linear_attention.h"
#include "cuda/linear_operands.cuh"
#include "cuda/linear_state.cuh"
#include "cuda/linear_tile.cuh"
#include "cuda/runtime.h"

namespace longctx::cuda {

template <class T, int kHeadDim, int kColumns>
class LinearBlock {
 public:
  LONGCTX_DEVICE LinearBlock(const LinearAttentionParams& p, const LinearLaunch& launch)
      : p_(p), launch_(launch), pass_(launch.pass), warp_(device::warp_index()), state_(p, warp_) {}

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
          state_.attend(weights, part, acc);
          if (part == kParts - 1) {
            device::sync_threads();  // C
            if (more) copy_q(next);
            device::commit_copies();
          }
          if (keys && pass_.pairs != LinearPairs::kNone) add_values(part, stage, acc);
          write_rows(chunk, part, acc);
        }
      }
      if (keys) state_.update(weights, stage);
      if (pass_.chunk_states != nullptr && item.chunk_row + chunk < p_.num_chunks) {
        const int64_t map = item.seq.batch_index * p_.num_q_heads + item.head;
        state_.store(pass_.chunk_states +
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
  using State = LinearState<T, kHeadDim, kColumns>;
  static constexpr int kWarpColumns = State::kWarpColumns;
  static constexpr int kColumnTiles = State::kColumnTiles;
  // Rows are worked on in parts whose accumulators fit beside those of the state.
  static constexpr int kParts = kColumnTiles;
  static constexpr int kRowTiles = kLinearChunk / 16 / kParts;
  static constexpr bool kHalf = State::kHalf;

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

  // acc += p v.
  LONGCTX_DEVICE void add_values(int part, int stage,
                                 float (&acc)[kRowTiles][2 * kColumnTiles][4]) const {
    const MatrixLane<kLinearChunk> p_lane(shared_.base, true);
#pragma unroll
    for (int step = 0; step < kLinearChunk / 16; ++step) {
      uint32_t values[kColumnTiles][4];
      load_values<Shared, kColumns>(shared_, stage, step, warp_, values);
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

  LONGCTX_DEVICE int64_t state_size() const { return p_.head_dim * p_.state_dim(); }

  LONGCTX_DEVICE void load_state() {
    const LinearItem& item = shared_.task().item;
    const int64_t segment = pass_.start_stride > 1 ? item.segment : 0;
    const int64_t first = (item.map(p_) * pass_.start_stride + segment) * state_size();
    state_.load(pass_.starts == nullptr ? nullptr : pass_.starts + first);
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
    if (to != nullptr) state_.store(to);
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
        const float unit = kHalf ? shared_.row_units()[row] : 1.0f;
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
  State state_;
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
