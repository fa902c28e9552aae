// linear_attention in float32, with plain products out of shared memory: the passes and items of
// linear_attention.cuh without tensor cores, which round their operands.
// q and k come in slices of 64 columns of head_dim; k comes a second time for the state, but for
// its last slice, which is still there. A warp's rows of p take the place of its rows of q.
//
//   for each slice of head_dim: load q, k (and v, once)     p += q k^T     acc += q s
//   p = weights * p     acc = weights * acc + p v     write out
//   for each slice of head_dim, from the last: load k     s = carry * s + (weights * k)^T v
#pragma once
#include "cuda/linear_attention_fp32.h"
#include "cuda/linear_fp32_tile.cuh"
#include "cuda/linear_weights.cuh"
#include "cuda/runtime.h"

namespace longctx::cuda::fp32 {

struct LinearLaunch {
  LinearPass pass;
  SourceRows q, k, v;
  bool out_aligned = false;  // a thread's columns of a row of out may be written in one access
};

// What a block works on.
struct LinearTask {
  LinearItem item;
  const float* q;  // [head_dim], the first row of the sequence
  const float* k;  // [head_dim]
  const float* v;  // the item's columns
  float* out;      // the item's columns
};

template <int kHeadDim, int kColumns>
struct LinearShared {
  static constexpr int kValueStride = LinearTile<kColumns>::kValueStride;
  static constexpr int kQ = 0;                                      // [kLinearChunk, kLinearSlice]
  static constexpr int kK = kQ + kLinearChunk * kLinearStride * 4;  // [kLinearChunk, kLinearSlice]
  static constexpr int kV = kK + kLinearChunk * kLinearStride * 4;  // [kLinearChunk, kColumns]
  static constexpr int kS = kV + kLinearChunk * kValueStride * 4;   // [kHeadDim, kColumns]
  static constexpr int kKeySums = kS + kHeadDim * kColumns * 4;     // [kHeadDim]
  static constexpr int kWeights = kKeySums + kHeadDim * 4;          // [2]
  static constexpr int kDecay = kWeights + 2 * sizeof(LinearWeights);
  static constexpr int kTask = kDecay + sizeof(LinearDecay);
  static constexpr int kBytes = kTask + sizeof(LinearTask);
  static_assert(kTask % alignof(LinearTask) == 0 && kBytes <= 99 * 1024);

  char* base = device::shared_memory();
  LONGCTX_DEVICE float* q(int row) const { return at(kQ) + row * kLinearStride; }  // of p, too
  LONGCTX_DEVICE float* k(int key) const { return at(kK) + key * kLinearStride; }
  LONGCTX_DEVICE float* v(int key) const { return at(kV) + key * kValueStride; }
  LONGCTX_DEVICE float* s(int d) const { return at(kS) + d * kColumns; }
  // With normalize: the last column of the state.
  LONGCTX_DEVICE float* key_sums() const { return at(kKeySums); }
  LONGCTX_DEVICE LinearWeights& weights(int parity) const {
    return reinterpret_cast<LinearWeights*>(base + kWeights)[parity];
  }
  LONGCTX_DEVICE LinearDecay& decay() const {
    return *reinterpret_cast<LinearDecay*>(base + kDecay);
  }
  LONGCTX_DEVICE LinearTask& task() const { return *reinterpret_cast<LinearTask*>(base + kTask); }

 private:
  LONGCTX_DEVICE float* at(int offset) const { return reinterpret_cast<float*>(base + offset); }
};

template <int kHeadDim, int kColumns>
class LinearBlock {
 public:
  LONGCTX_DEVICE LinearBlock(const LinearAttentionParams& p, const LinearLaunch& launch)
      : p_(p),
        launch_(launch),
        pass_(launch.pass),
        num_slices_((static_cast<int>(p.head_dim) + kLinearSlice - 1) / kLinearSlice),
        warp_(device::warp_index()) {}

  LONGCTX_DEVICE void run() {
    if (warp_ == 0) find_task();
    device::sync_threads();
    const LinearItem& item = shared_.task().item;
    const int num_chunks = static_cast<int>(item.num_chunks);
    LinearWeigher weigher(p_, pass_, item, shared_.decay());
    if (warp_ == 0) {
      weigher.begin();
      if (num_chunks > 0) weigh(weigher, 0);
    }
    load_state();

    // for each chunk
#pragma unroll 1
    for (int step = 0; step < num_chunks; ++step) {
      const int64_t chunk = item.chunk(pass_, step);
      const int num_keys = pass_.keys ? item.num_keys(chunk) : 0;
      const bool rows = pass_.rows && item.num_rows(chunk) > 0;
      const LinearWeights& weights = shared_.weights(step % 2);
      if (rows) {
        Scores p = {};
        Rows acc = {};
        float key_sums[kLinearOwnRows] = {};
#pragma unroll 1
        for (int slice = 0; slice < num_slices_; ++slice) {
          load_slice(chunk, slice, true, slice == 0);
          attend_slice(slice, num_keys, p, acc, key_sums);
        }
        weigh_rows(weights, num_keys, p, acc, key_sums);
        if (p_.normalize) sum_row_weights(chunk, p, key_sums);
        if (num_keys > 0 && pass_.pairs != LinearPairs::kNone) add_values(num_keys, p, acc);
        write_rows(chunk, key_sums, acc);
      } else {
        load_slice(chunk, num_slices_ - 1, false, true);
      }
      if (warp_ == 0 && step + 1 < num_chunks) weigh(weigher, step + 1);
      if (num_keys > 0) {
#pragma unroll 1
        for (int slice = num_slices_ - 1; slice >= 0; --slice) {
          if (slice < num_slices_ - 1) {
            load_slice(chunk, slice, false, false);
          } else if (rows) {
            device::sync_threads();  // every warp has read the state
          }
          update_slice(weights, slice, num_keys);
        }
        state_is_zero_ = false;
      }
      if (pass_.chunk_states != nullptr && item.chunk_row + chunk < p_.num_chunks) {
        const int64_t map = item.seq.batch_index * p_.num_q_heads + item.head;
        store_state(pass_.chunk_states +
                    (map * p_.num_chunks + item.chunk_row + chunk) * state_size());
      }
    }
    write_last_state(weigher);
  }

 private:
  using Shared = LinearShared<kHeadDim, kColumns>;
  using Tile = LinearTile<kColumns>;
  using Own = typename Tile::Own;
  using Scores = typename Tile::Scores;
  using Rows = typename Tile::Rows;
  static constexpr int kOwnColumns = Tile::kOwnColumns;

  LONGCTX_DEVICE void find_task() {
    const LinearItem item = linear_item_at(p_, pass_, device::block_index());
    if (device::lane_index() > 0) return;
    LinearTask& task = shared_.task();
    task.item = item;
    task.q = row_of(p_.q, item, item.head, item.seq.q_begin);
    task.k = row_of(p_.k, item, item.kv_head, item.seq.k_begin);
    task.v = row_of(p_.v, item, item.kv_head, item.seq.k_begin) + item.first_column;
    task.out = row_of(pass_.out, item, item.head, item.seq.q_begin) + item.first_column;
  }
  LONGCTX_DEVICE static float* row_of(const TensorView& view, const LinearItem& item, int64_t head,
                                      int64_t row) {
    return static_cast<float*>(view.data) + item.seq.batch_index * view.batch_stride +
           head * view.head_stride + row * view.seq_stride;
  }

  LONGCTX_DEVICE void weigh(LinearWeigher& weigher, int step) const {
    const int64_t chunk = shared_.task().item.chunk(pass_, step);
    weigher.fetch(chunk);
    weigher.weigh(chunk, shared_.weights(step % 2));
  }

  // Waits until every thread is done with the last slice, and until this one is there.
  LONGCTX_DEVICE void load_slice(int64_t chunk, int slice, bool with_q, bool with_v) const {
    const LinearTask& task = shared_.task();
    const int num_rows = task.item.num_rows(chunk);
    const int num_keys = pass_.keys ? task.item.num_keys(chunk) : 0;
    const int first = slice * kLinearSlice;
    device::sync_threads();
    if (with_q) {
      copy_chunk<kLinearSlice>(shared_.q(0), task.q + first, chunk, num_rows, launch_.q, first);
    }
    if (num_keys > 0) {
      copy_chunk<kLinearSlice>(shared_.k(0), task.k + first, chunk, num_keys, launch_.k, first);
      if (with_v) {
        const int column = static_cast<int>(task.item.first_column);
        copy_chunk<kColumns>(shared_.v(0), task.v, chunk, num_keys, launch_.v, column);
      }
    }
    device::wait_copies<0>();
    device::sync_threads();
  }

  // Keys that some row of this warp sees: [first, last), multiples of 16 at both ends but for the
  // end of the sequence.
  LONGCTX_DEVICE int first_key() const {
    return pass_.pairs == LinearPairs::kFromRow ? warp_ * kLinearWarpRows : 0;
  }
  LONGCTX_DEVICE int last_key(int num_keys) const {
    const int last =
        pass_.pairs == LinearPairs::kUpToRow ? (warp_ + 1) * kLinearWarpRows : kLinearChunk;
    return last < num_keys ? last : num_keys;
  }
  LONGCTX_DEVICE bool sees(int row, int key) const {
    return pass_.pairs == LinearPairs::kUpToRow   ? key <= row
           : pass_.pairs == LinearPairs::kFromRow ? key >= row
                                                  : true;
  }

  // p += q k^T; acc += q s; with normalize, key_sums += q z, each thread its own columns.
  LONGCTX_DEVICE void attend_slice(int slice, int num_keys, Scores& p, Rows& acc,
                                   float (&key_sums)[kLinearOwnRows]) const {
    const int left = static_cast<int>(p_.head_dim) - slice * kLinearSlice;
    const int depth = left < kLinearSlice ? left : kLinearSlice;
    if (num_keys > 0 && pass_.pairs != LinearPairs::kNone) {
      tile_.add_scores(shared_.q(0), shared_.k(0), depth, first_key(), last_key(num_keys), p);
    }
    if (state_is_zero_) return;
    const float* state = shared_.s(slice * kLinearSlice);
    tile_.add_product(shared_.q(0), 0, depth, state, kColumns, acc);
    if (!p_.normalize) return;
    const int d = tile_.lane * kChunk;
    const Four z = load_four(shared_.key_sums() + slice * kLinearSlice + d);
#pragma unroll
    for (int r = 0; r < kLinearOwnRows; ++r) {
      const Four q = load_four(shared_.q(tile_.first_row + r) + d);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) key_sums[r] += q.x[e] * z.x[e];
    }
  }

  LONGCTX_DEVICE void weigh_rows(const LinearWeights& weights, int num_keys, Scores& p, Rows& acc,
                                 float (&key_sums)[kLinearOwnRows]) const {
    const bool pairs = num_keys > 0 && pass_.pairs != LinearPairs::kNone;
    const bool per_token = p_.log_decay.per_token;
#pragma unroll
    for (int r = 0; r < kLinearOwnRows; ++r) {
      const int row = tile_.first_row + r;
      const float weight = weights.rows[row];
#pragma unroll
      for (int c = 0; c < kOwnColumns; ++c) acc[r][c] = weighed(acc[r][c], weight);
      key_sums[r] = weighed(key_sums[r], weight);
      if (!pairs) continue;
      const float2 row_sum = per_token ? weights.sums[row] : float2{0, 0};
#pragma unroll
      for (int j = 0; j < kLinearOwnKeys; ++j) {
        const int key = tile_.key(j);
        const float pair = per_token ? pair_weight(row_sum, weights.sums[key])
                                     : pair_weight(shared_.decay(), row, key);
        p[r][j] = sees(row, key) ? p[r][j] * pair : 0.0f;
      }
    }
  }

  // key_sums = the sums of the weights of the rows.
  LONGCTX_DEVICE void sum_row_weights(int64_t chunk, const Scores& p,
                                      float (&key_sums)[kLinearOwnRows]) const {
    const LinearItem& item = shared_.task().item;
#pragma unroll
    for (int r = 0; r < kLinearOwnRows; ++r) {
      float sum = key_sums[r];
#pragma unroll
      for (int j = 0; j < kLinearOwnKeys; ++j) sum += p[r][j];
#pragma unroll
      for (int mask = kLinearRowThreads / 2; mask > 0; mask /= 2) {
        sum += device::shuffle_xor(sum, mask);
      }
      const int row = tile_.first_row + r;
      if (row < item.num_rows(chunk)) {
        const int64_t index = item.row_index(p_, chunk * kLinearChunk + row);
        if (pass_.more_sums != nullptr) sum += pass_.more_sums[index];
        if (pass_.sums != nullptr && item.first_column == 0 && tile_.lane == 0)
          pass_.sums[index] = sum;
      }
      key_sums[r] = sum;
    }
  }

  // acc += p v.
  LONGCTX_DEVICE void add_values(int num_keys, const Scores& p, Rows& acc) const {
    device::sync_warp();  // the warp has read its rows of q
#pragma unroll
    for (int r = 0; r < kLinearOwnRows; ++r) {
#pragma unroll
      for (int j = 0; j < kLinearOwnKeys; ++j) {
        shared_.q(tile_.first_row + r)[tile_.key(j)] = p[r][j];
      }
    }
    device::sync_warp();
    tile_.add_product(shared_.q(0), first_key(), last_key(num_keys), shared_.v(0),
                      Shared::kValueStride, acc);
  }

  // s = carry * s + (weights * k)^T v, of a slice of head_dim.
  LONGCTX_DEVICE void update_slice(const LinearWeights& weights, int slice, int num_keys) const {
    Rows sums = {};
    tile_.add_keys(shared_.k(0), weights.keys, num_keys, shared_.v(0), sums);
    const float carry = weights.carry;
#pragma unroll
    for (int r = 0; r < kLinearOwnRows; ++r) {
      Own& s = own_state(slice * kLinearSlice + tile_.first_row + r);
#pragma unroll
      for (int c = 0; c < kOwnColumns; ++c) {
        s.values[c] = weighed(s.values[c], carry) + sums[r][c];
      }
    }
    const int d = device::thread_index();
    if (!p_.normalize || d >= kLinearSlice) return;
    float sum = 0;
    for (int key = 0; key < num_keys; ++key) sum += weights.keys[key] * shared_.k(key)[d];
    float& z = shared_.key_sums()[slice * kLinearSlice + d];
    z = weighed(z, carry) + sum;
  }

  LONGCTX_DEVICE Own& own_state(int d) const { return tile_.own(shared_.s(d)); }

  // Visits the thread's elements of the state that exist: visit(element, its place in [head_dim,
  // state_dim]); if `sums`, among them those of the last column.
  template <class Visit>
  LONGCTX_DEVICE void for_each_state(bool sums, const Visit& visit) const {
    const int state_dim = static_cast<int>(p_.state_dim());
    const int first_column =
        static_cast<int>(shared_.task().item.first_column) + tile_.lane * kOwnColumns;
#pragma unroll 1
    for (int slice = 0; slice < num_slices_; ++slice) {
#pragma unroll
      for (int r = 0; r < kLinearOwnRows; ++r) {
        const int d = slice * kLinearSlice + tile_.first_row + r;
        Own& s = own_state(d);
#pragma unroll
        for (int c = 0; c < kOwnColumns; ++c) {
          if (d < p_.head_dim && first_column + c < p_.head_dim_v) {
            visit(s.values[c], d * state_dim + first_column + c);
          }
        }
      }
      // As update_slice() deals them out.
      const int d = slice * kLinearSlice + device::thread_index();
      if (sums && p_.normalize && device::thread_index() < kLinearSlice && d < p_.head_dim) {
        visit(shared_.key_sums()[d], d * state_dim + state_dim - 1);
      }
    }
  }
  LONGCTX_DEVICE int64_t state_size() const { return p_.head_dim * p_.state_dim(); }

  LONGCTX_DEVICE void load_state() {
    const LinearItem& item = shared_.task().item;
    state_is_zero_ = pass_.starts == nullptr;
#pragma unroll 1
    for (int d = tile_.first_row; d < kHeadDim; d += kLinearSlice) {
#pragma unroll
      for (int r = 0; r < kLinearOwnRows; ++r) own_state(d + r) = Own{};
    }
    if (device::thread_index() < kLinearSlice) {
#pragma unroll
      for (int d = 0; d < kHeadDim; d += kLinearSlice) {
        shared_.key_sums()[d + device::thread_index()] = 0;
      }
    }
    if (state_is_zero_) return;
    const int64_t segment = pass_.start_stride > 1 ? item.segment : 0;
    const float* from = pass_.starts + (item.map(p_) * pass_.start_stride + segment) * state_size();
    for_each_state(true, [from](float& element, int at) { element = from[at]; });
  }

  LONGCTX_DEVICE void store_state(float* to) const {
    const bool sums = shared_.task().item.first_column == 0;  // which every item of a head has
    for_each_state(sums, [to](const float& element, int at) { to[at] = element; });
  }

  LONGCTX_DEVICE void write_last_state(const LinearWeigher& weigher) const {
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
  LONGCTX_DEVICE void write_rows(int64_t chunk, const float (&row_sums)[kLinearOwnRows],
                                 Rows& acc) const {
    const LinearTask& task = shared_.task();
    const int num_rows = task.item.num_rows(chunk);
    const int column = tile_.lane * kOwnColumns;
    const int num_columns = static_cast<int>(p_.head_dim_v - task.item.first_column) - column;
    const int64_t first = chunk * kLinearChunk;
#pragma unroll
    for (int r = 0; r < kLinearOwnRows; ++r) {
      const int row = tile_.first_row + r;
      if (row >= num_rows) continue;
      float scale = 1.0f;
      if (!pass_.raw_out) {
        scale = static_cast<float>(p_.scale);
        if (p_.normalize) scale /= row_sums[r] + static_cast<float>(p_.eps);
      }
      const float* more = nullptr;
      if (pass_.more != nullptr) {
        more = pass_.more + task.item.row_index(p_, first + row) * p_.head_dim_v +
               task.item.first_column + column;
      }
      float* out = task.out + (first + row) * pass_.out.seq_stride + column;
      Own own;
#pragma unroll
      for (int c = 0; c < kOwnColumns; ++c) {
        const float sum = more != nullptr && c < num_columns ? acc[r][c] + more[c] : acc[r][c];
        own.values[c] = sum * scale;
      }
      if (launch_.out_aligned) {
        if (num_columns > 0) *reinterpret_cast<Own*>(out) = own;
        continue;
      }
#pragma unroll
      for (int c = 0; c < kOwnColumns; ++c) {
        if (c < num_columns) out[c] = own.values[c];
      }
    }
  }

  const LinearAttentionParams& p_;
  const LinearLaunch& launch_;
  const LinearPass& pass_;
  const Shared shared_;
  const int num_slices_;
  const int warp_;
  const Tile tile_;
  bool state_is_zero_ = true;
};

template <int kHeadDim, int kColumns>
LONGCTX_KERNEL(kThreads, 2)
linear_attention_kernel(const LONGCTX_GRID_CONSTANT LinearAttentionParams p,
                        const LONGCTX_GRID_CONSTANT LinearLaunch launch) {
  LinearBlock<kHeadDim, kColumns>(p, launch).run();
}

}  // namespace longctx::cuda::fp32

namespace longctx::cuda {

template <class T, int head_dim>
void launch_linear_attention_fp32(const LinearAttentionParams& params, const LinearPass& pass) {
  constexpr int kColumns = linear_fp32_slice_columns(head_dim);
  fp32::LinearLaunch launch_params;
  launch_params.pass = pass;
  launch_params.q = source_rows(params.q, params.head_dim, fp32::kChunk);
  launch_params.k = source_rows(params.k, params.head_dim, fp32::kChunk);
  launch_params.v = source_rows(params.v, params.head_dim_v, fp32::kChunk);
  launch_params.out_aligned = source_rows(pass.out, params.head_dim_v, fp32::kChunk).aligned;
  launch(pass.op, &fp32::linear_attention_kernel<head_dim, kColumns>,
         dim3(static_cast<unsigned>(num_items(params, pass))), fp32::kThreads,
         fp32::LinearShared<head_dim, kColumns>::kBytes, params, launch_params);
}

template <class T, int head_dim>
int64_t linear_attention_fp32_shared_bytes() {
  return fp32::LinearShared<head_dim, linear_fp32_slice_columns(head_dim)>::kBytes;
}

}  // namespace longctx::cuda
