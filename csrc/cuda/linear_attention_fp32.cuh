// linear_attention in float32, with plain products out of shared memory: the passes and items of
// linear_attention.cuh without tensor cores, which round their operands.
// Every product has 64 rows, eight to a thread, and 32 or 64 columns, dealt to the sixteen threads
// that share the rows. q and k come in slices of 64 columns of head_dim; k comes a second time for
// the state, but for its last slice, which is still there. A warp's rows of p take the place of its
// rows of q.
//
//   for each slice of head_dim: load q, k (and v, once)     p += q k^T     acc += q s
//   p = weights * p     acc = weights * acc + p v     write out
//   for each slice of head_dim, from the last: load k     s = carry * s + (weights * k)^T v
#pragma once
#include "cuda/columns.cuh"
#include "cuda/fp32_rows.cuh"
#include "cuda/linear_attention_fp32.h"
#include "cuda/linear_weights.cuh"
#include "cuda/runtime.h"

namespace longctx::cuda::fp32 {

constexpr int kLinearSlice = 64;       // columns of head_dim
constexpr int kLinearRowThreads = 16;  // of a row
constexpr int kLinearOwnRows = kLinearChunk * kLinearRowThreads / kThreads;
constexpr int kLinearOwnKeys = kLinearChunk / kLinearRowThreads;
constexpr int kLinearWarpRows = kLinearChunk * device::kWarpSize / kThreads;

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
  static constexpr int kStride = kLinearSlice + kPad;
  static constexpr int kValueStride = kColumns + kPad;
  static constexpr int kQ = 0;                                     // [kLinearChunk, kLinearSlice]
  static constexpr int kK = kQ + kLinearChunk * kStride * 4;       // [kLinearChunk, kLinearSlice]
  static constexpr int kV = kK + kLinearChunk * kStride * 4;       // [kLinearChunk, kColumns]
  static constexpr int kS = kV + kLinearChunk * kValueStride * 4;  // [kHeadDim, kColumns]
  static constexpr int kKeySums = kS + kHeadDim * kColumns * 4;    // [kHeadDim]
  static constexpr int kWeights = kKeySums + kHeadDim * 4;         // [2]
  static constexpr int kDecay = kWeights + 2 * sizeof(LinearWeights);
  static constexpr int kTask = kDecay + sizeof(LinearDecay);
  static constexpr int kBytes = kTask + sizeof(LinearTask);
  static_assert(kTask % alignof(LinearTask) == 0 && kBytes <= 99 * 1024);

  char* base = device::shared_memory();
  LONGCTX_DEVICE float* q(int row) const { return at(kQ) + row * kStride; }  // of p, too
  LONGCTX_DEVICE float* k(int key) const { return at(kK) + key * kStride; }
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
        warp_(device::warp_index()),
        lane_(device::thread_index() % kLinearRowThreads),
        first_row_(device::thread_index() / kLinearRowThreads * kLinearOwnRows) {}

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
        float p[kLinearOwnRows][kLinearOwnKeys] = {}, acc[kLinearOwnRows][kOwnColumns] = {};
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
  static constexpr int kOwnColumns = kColumns / kLinearRowThreads;
  using Own = Columns<float, kOwnColumns>;

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
      copy<kLinearSlice>(shared_.q(0), task.q + first, chunk, num_rows, launch_.q, first);
    }
    if (num_keys > 0) {
      copy<kLinearSlice>(shared_.k(0), task.k + first, chunk, num_keys, launch_.k, first);
      if (with_v) {
        const int column = static_cast<int>(task.item.first_column);
        copy<kColumns>(shared_.v(0), task.v, chunk, num_keys, launch_.v, column);
      }
    }
    device::wait_copies<0>();
    device::sync_threads();
  }
  // `rows` rows of a chunk, of which `data` is the first of the sequence from column `first` on;
  // zeros behind them.
  template <int kWidth>
  LONGCTX_DEVICE static void copy(float* tile, const float* data, int64_t chunk, int rows,
                                  const SourceRows& source, int first) {
    SourceRows part = source;
    part.dim -= first;
    const float* begin = data + chunk * kLinearChunk * source.row_stride;
    copy_rows<kWidth>(tile, kLinearChunk, part, [&](int row) -> const float* {
      return row < rows ? begin + row * source.row_stride : nullptr;
    });
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
  LONGCTX_DEVICE void attend_slice(int slice, int num_keys,
                                   float (&p)[kLinearOwnRows][kLinearOwnKeys],
                                   float (&acc)[kLinearOwnRows][kOwnColumns],
                                   float (&key_sums)[kLinearOwnRows]) const {
    const int left = static_cast<int>(p_.head_dim) - slice * kLinearSlice;
    const int depth = left < kLinearSlice ? left : kLinearSlice;
    if (num_keys > 0 && pass_.pairs != LinearPairs::kNone) {
      const int begin = first_key(), end = last_key(num_keys);
#pragma unroll 2
      for (int d = 0; d < depth; d += kChunk) {
        Four k[kLinearOwnKeys];
#pragma unroll
        for (int j = 0; j < kLinearOwnKeys; ++j) {
          k[j] = load_four(shared_.k(lane_ + j * kLinearRowThreads) + d);
        }
#pragma unroll
        for (int r = 0; r < kLinearOwnRows; ++r) {
          const Four q = load_four(shared_.q(first_row_ + r) + d);
#pragma unroll
          for (int j = 0; j < kLinearOwnKeys; ++j) {
            if (j * kLinearRowThreads < begin || j * kLinearRowThreads >= end) continue;
#pragma unroll
            for (int e = 0; e < kChunk; ++e) p[r][j] += q.x[e] * k[j].x[e];
          }
        }
      }
    }
    if (state_is_zero_) return;
    const float* state = shared_.s(slice * kLinearSlice);
    multiply(shared_.q(0), 0, depth, state, kColumns, acc);
    if (!p_.normalize) return;
    const int d = lane_ * kChunk;
    const Four z = load_four(shared_.key_sums() + slice * kLinearSlice + d);
#pragma unroll
    for (int r = 0; r < kLinearOwnRows; ++r) {
      const Four q = load_four(shared_.q(first_row_ + r) + d);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) key_sums[r] += q.x[e] * z.x[e];
    }
  }

  // acc += a [64, columns begin to end] b [end, kColumns]; what a and b have up to the next
  // multiple of 4 are zeros in one of them.
  LONGCTX_DEVICE void multiply(const float* a, int begin, int end, const float* b, int b_stride,
                               float (&acc)[kLinearOwnRows][kOwnColumns]) const {
    a += first_row_ * Shared::kStride;
    b += lane_ * kOwnColumns;
#pragma unroll 2
    for (int d = begin; d < end; d += kChunk) {
      Own columns[kChunk];
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        columns[e] = *reinterpret_cast<const Own*>(b + (d + e) * b_stride);
      }
#pragma unroll
      for (int r = 0; r < kLinearOwnRows; ++r) {
        const Four x = load_four(a + r * Shared::kStride + d);
#pragma unroll
        for (int e = 0; e < kChunk; ++e) {
#pragma unroll
          for (int c = 0; c < kOwnColumns; ++c) acc[r][c] += x.x[e] * columns[e].values[c];
        }
      }
    }
  }

  // A weight of 0 forgets, whatever was there.
  LONGCTX_DEVICE static float weighed(float x, float weight) {
    return weight == 0 ? 0.0f : x * weight;
  }

  LONGCTX_DEVICE void weigh_rows(const LinearWeights& weights, int num_keys,
                                 float (&p)[kLinearOwnRows][kLinearOwnKeys],
                                 float (&acc)[kLinearOwnRows][kOwnColumns],
                                 float (&key_sums)[kLinearOwnRows]) const {
    const bool pairs = num_keys > 0 && pass_.pairs != LinearPairs::kNone;
    const bool per_token = p_.log_decay.per_token;
#pragma unroll
    for (int r = 0; r < kLinearOwnRows; ++r) {
      const int row = first_row_ + r;
      const float weight = weights.rows[row];
#pragma unroll
      for (int c = 0; c < kOwnColumns; ++c) acc[r][c] = weighed(acc[r][c], weight);
      key_sums[r] = weighed(key_sums[r], weight);
      if (!pairs) continue;
      const float2 row_sum = per_token ? weights.sums[row] : float2{0, 0};
#pragma unroll
      for (int j = 0; j < kLinearOwnKeys; ++j) {
        const int key = lane_ + j * kLinearRowThreads;
        const float pair = per_token ? pair_weight(row_sum, weights.sums[key])
                                     : pair_weight(shared_.decay(), row, key);
        p[r][j] = sees(row, key) ? p[r][j] * pair : 0.0f;
      }
    }
  }

  // key_sums = the sums of the weights of the rows.
  LONGCTX_DEVICE void sum_row_weights(int64_t chunk,
                                      const float (&p)[kLinearOwnRows][kLinearOwnKeys],
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
      const int row = first_row_ + r;
      if (row < item.num_rows(chunk)) {
        const int64_t index = item.row_index(p_, chunk * kLinearChunk + row);
        if (pass_.more_sums != nullptr) sum += pass_.more_sums[index];
        if (pass_.sums != nullptr && item.first_column == 0 && lane_ == 0) pass_.sums[index] = sum;
      }
      key_sums[r] = sum;
    }
  }

  // acc += p v.
  LONGCTX_DEVICE void add_values(int num_keys, const float (&p)[kLinearOwnRows][kLinearOwnKeys],
                                 float (&acc)[kLinearOwnRows][kOwnColumns]) const {
    device::sync_warp();  // the warp has read its rows of q
#pragma unroll
    for (int r = 0; r < kLinearOwnRows; ++r) {
#pragma unroll
      for (int j = 0; j < kLinearOwnKeys; ++j) {
        shared_.q(first_row_ + r)[lane_ + j * kLinearRowThreads] = p[r][j];
      }
    }
    device::sync_warp();
    multiply(shared_.q(0), first_key(), last_key(num_keys), shared_.v(0), Shared::kValueStride,
             acc);
  }

  // s = carry * s + (weights * k)^T v, of a slice of head_dim.
  LONGCTX_DEVICE void update_slice(const LinearWeights& weights, int slice, int num_keys) const {
    float sums[kLinearOwnRows][kOwnColumns] = {};
#pragma unroll 2
    for (int key = 0; key < num_keys; ++key) {
      const float weight = weights.keys[key];
      Own v = *reinterpret_cast<const Own*>(shared_.v(key) + lane_ * kOwnColumns);
#pragma unroll
      for (int c = 0; c < kOwnColumns; ++c) v.values[c] *= weight;
#pragma unroll
      for (int first = 0; first < kLinearOwnRows; first += kChunk) {
        const Four k = load_four(shared_.k(key) + first_row_ + first);
#pragma unroll
        for (int e = 0; e < kChunk; ++e) {
#pragma unroll
          for (int c = 0; c < kOwnColumns; ++c) sums[first + e][c] += k.x[e] * v.values[c];
        }
      }
    }
    const float carry = weights.carry;
#pragma unroll
    for (int r = 0; r < kLinearOwnRows; ++r) {
      Own& s = own_state(slice * kLinearSlice + first_row_ + r);
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

  LONGCTX_DEVICE Own& own_state(int d) const {
    return *reinterpret_cast<Own*>(shared_.s(d) + lane_ * kOwnColumns);
  }

  // Visits the thread's elements of the state that exist: visit(element, its place in [head_dim,
  // state_dim]); if `sums`, among them those of the last column.
  template <class Visit>
  LONGCTX_DEVICE void for_each_state(bool sums, const Visit& visit) const {
    const int state_dim = static_cast<int>(p_.state_dim());
    const int first_column =
        static_cast<int>(shared_.task().item.first_column) + lane_ * kOwnColumns;
#pragma unroll 1
    for (int slice = 0; slice < num_slices_; ++slice) {
#pragma unroll
      for (int r = 0; r < kLinearOwnRows; ++r) {
        const int d = slice * kLinearSlice + first_row_ + r;
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
    for (int d = first_row_; d < kHeadDim; d += kLinearSlice) {
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
                                 float (&acc)[kLinearOwnRows][kOwnColumns]) const {
    const LinearTask& task = shared_.task();
    const int num_rows = task.item.num_rows(chunk);
    const int column = lane_ * kOwnColumns;
    const int num_columns = static_cast<int>(p_.head_dim_v - task.item.first_column) - column;
    const int64_t first = chunk * kLinearChunk;
#pragma unroll
    for (int r = 0; r < kLinearOwnRows; ++r) {
      const int row = first_row_ + r;
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
  const int lane_;       // among the threads of a row
  const int first_row_;  // of the thread's eight
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
