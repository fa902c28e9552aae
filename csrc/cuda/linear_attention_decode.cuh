// S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T, out_t = scale q_t^T S_t for a few tokens on a state
// in place. The state is what the time goes into: it is read once, kept in registers over all
// tokens, and written once, as it was after the last token that is kept. A block owns 32 columns of
// one head's state, so that a single sequence fills a GPU. Eight threads share a row, four columns
// each; the sixteen groups of eight own neighbouring rows.
#pragma once
#include "cuda/columns.cuh"
#include "device/thread.cuh"
#include "longctx/decay.h"

namespace longctx::cuda {

constexpr int kDecodeThreads = 128;
constexpr int kDecodeWarps = kDecodeThreads / device::kWarpSize;
constexpr int kDecodeColumns = 32;  // of a block
constexpr int kDecodeOwn = 4;       // columns of a thread: 16 bytes
constexpr int kDecodeRowThreads = kDecodeColumns / kDecodeOwn;
constexpr int kDecodeRowGroups = kDecodeThreads / kDecodeRowThreads;
constexpr int kDecodeTokens = 8;  // between two barriers, at most

// What one launch does of a call.
struct DecodeLaunch {
  int64_t first_column = 0;  // of the state
  int64_t num_columns = 0;
  uint32_t num_slices = 0;  // of num_columns, one a block
  uint32_t num_heads = 0;   // of q
  uint32_t group_size = 0;  // heads of q to one of k
  int32_t tokens = 0;       // between two barriers
  // [batch, num_q_heads, num_tokens]: q^T z + eps, or null without `normalize`. The column z is
  // updated and the sums are written by a launch of its own, because blocks of this one would read
  // z while one of them changes it.
  float* denominators = nullptr;
  bool of_z = false;  // v is 1 here
};

template <int kHeadDim>
struct DecodeShared {
  int tokens;
  char* base = device::shared_memory();
  LONGCTX_DEVICE float* q(int token) const { return at(0) + token * kHeadDim; }
  LONGCTX_DEVICE float* k(int token) const { return q(tokens + token); }
  LONGCTX_DEVICE float* v(int token) const { return q(2 * tokens) + token * kDecodeColumns; }
  // Of one warp's rows: [kDecodeColumns].
  LONGCTX_DEVICE float* sums(int token, int warp) const {
    return v(tokens) + (token * kDecodeWarps + warp) * kDecodeColumns;
  }
  LONGCTX_DEVICE float& decay(int token) const { return sums(tokens, 0)[token]; }

  static constexpr int64_t bytes(int64_t tokens) {
    return tokens * (2 * kHeadDim + (1 + kDecodeWarps) * kDecodeColumns + 1) * 4;
  }

 private:
  LONGCTX_DEVICE float* at(int offset) const { return reinterpret_cast<float*>(base + offset); }
};

LONGCTX_DEVICE int64_t offset_in(const TensorView& view, int64_t batch, int64_t head, int64_t row) {
  return batch * view.batch_stride + head * view.head_stride + row * view.seq_stride;
}

// A block's part of a state [head_dim, state_dim]. `vectors`: a thread's columns are neighbours
// that one access takes; else they are kDecodeRowThreads apart, so that a row's threads stay
// together.
template <int kRows, bool vectors>
struct DecodeState {
  float* first;  // of the block's columns
  int64_t stride;
  int32_t num_rows;
  int32_t num_columns;  // with `vectors` a multiple of kDecodeOwn
  int32_t first_row = device::thread_index() / kDecodeRowThreads * kRows;
  int32_t lane = device::thread_index() % kDecodeRowThreads;
  float x[kRows][kDecodeOwn];

  LONGCTX_DEVICE int column(int i) const {
    return vectors ? lane * kDecodeOwn + i : lane + i * kDecodeRowThreads;
  }
  // Zeros where the state has no element.
  LONGCTX_DEVICE void load() {
    const float* row = first + first_row * stride;
#pragma unroll
    for (int r = 0; r < kRows; ++r, row += stride) {
      const bool live = first_row + r < num_rows;
      if constexpr (vectors) {
        Columns<float, kDecodeOwn> loaded = {};
        if (live && column(0) < num_columns) {
          loaded = *reinterpret_cast<const Columns<float, kDecodeOwn>*>(row + column(0));
        }
#pragma unroll
        for (int i = 0; i < kDecodeOwn; ++i) x[r][i] = loaded.values[i];
      } else {
#pragma unroll
        for (int i = 0; i < kDecodeOwn; ++i) {
          x[r][i] = live && column(i) < num_columns ? row[column(i)] : 0.0f;
        }
      }
    }
  }
  LONGCTX_DEVICE void store() const {
    const int own = device::opaque(first_row);  // no addresses are kept from load() to here
    float* row = first + own * stride;
#pragma unroll
    for (int r = 0; r < kRows; ++r, row += stride) {
      if (own + r >= num_rows) continue;
      if constexpr (vectors) {
        if (column(0) >= num_columns) continue;
        Columns<float, kDecodeOwn> stored;
#pragma unroll
        for (int i = 0; i < kDecodeOwn; ++i) stored.values[i] = x[r][i];
        *reinterpret_cast<Columns<float, kDecodeOwn>*>(row + column(0)) = stored;
      } else {
#pragma unroll
        for (int i = 0; i < kDecodeOwn; ++i) {
          if (column(i) < num_columns) row[column(i)] = x[r][i];
        }
      }
    }
  }
  // state = decay state + k v^T; sums[i] += q^T state, of this thread's rows.
  LONGCTX_DEVICE void step(const float* q, const float* k, const float (&v)[kDecodeOwn],
                           float decay, float (&sums)[kDecodeOwn]) {
    using Four = Columns<float, 4>;
#pragma unroll
    for (int r = 0; r < kRows; r += 4) {
      const Four query = *reinterpret_cast<const Four*>(q + first_row + r);
      const Four key = *reinterpret_cast<const Four*>(k + first_row + r);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int i = 0; i < kDecodeOwn; ++i) {
          float& s = x[r + j][i];
          s = s * decay + key.values[j] * v[i];
          sums[i] += query.values[j] * s;
        }
      }
    }
  }
  // A decay of 0 forgets whatever was there, infinities too.
  LONGCTX_DEVICE void forget() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kDecodeOwn; ++i) x[r][i] = 0;
    }
  }
};

// T: of q, k, v and out. kRows: of the state, of a thread.
template <class T, int kRows, bool vectors>
LONGCTX_KERNEL(kDecodeThreads, kRows > 8 ? 2 : 5)
linear_attention_decode_kernel(const LONGCTX_GRID_CONSTANT LinearAttentionDecodeParams p,
                               const LONGCTX_GRID_CONSTANT DecodeLaunch launch) {
  constexpr int kHeadDim = kRows * kDecodeRowGroups;
  // Divisions of 32 bits: those of 64 would take as long as the state's way here.
  const auto block = static_cast<uint32_t>(device::block_index());
  const uint32_t map = block / launch.num_slices;
  const uint32_t batch = map / launch.num_heads, head = map % launch.num_heads;
  const uint32_t kv_head = head / launch.group_size;
  // Opaque: where the compiler knows the lowest bits it adds columns by OR, and then no longer sees
  // that a thread's are neighbours, which takes four stores for one.
  const int64_t first_column =
      device::opaque(static_cast<int>(block % launch.num_slices) * kDecodeColumns);
  const int64_t left = launch.num_columns - first_column;
  const int num_columns = left < kDecodeColumns ? static_cast<int>(left) : kDecodeColumns;
  const int thread = device::thread_index();
  T* out = static_cast<T*>(p.out.data) + offset_in(p.out, batch, head, 0) + first_column;

  const int64_t slot = p.state_indices != nullptr ? p.state_indices[batch] : batch;
  if (slot < 0 || slot >= p.num_slots) {
    if (launch.of_z) return;
#pragma unroll 1
    for (int64_t i = thread; i < p.num_tokens * kDecodeColumns; i += kDecodeThreads) {
      const int column = static_cast<int>(i % kDecodeColumns);
      T* row = out + i / kDecodeColumns * p.out.seq_stride;
      if (column < num_columns) device::narrow(0.0f, row[column]);
    }
    return;
  }
  int64_t kept = p.commit != nullptr ? p.commit[batch] : p.num_tokens;
  kept = kept < p.num_tokens ? kept : p.num_tokens;

  DecodeState<kRows, vectors> state;
  state.first = static_cast<float*>(p.state.data) + offset_in(p.state, slot, head, 0) +
                launch.first_column + first_column;
  state.stride = p.state.seq_stride;
  state.num_rows = static_cast<int32_t>(p.head_dim);
  state.num_columns = num_columns;
  state.load();

  const T* q_rows = static_cast<const T*>(p.q.data) + offset_in(p.q, batch, head, 0);
  const T* k_rows = static_cast<const T*>(p.k.data) + offset_in(p.k, batch, kv_head, 0);
  const T* v_rows =
      static_cast<const T*>(p.v.data) + offset_in(p.v, batch, kv_head, 0) + first_column;
  const int64_t first_output = int64_t{map} * p.num_tokens;  // in denominators
  const DecodeShared<kHeadDim> shared{launch.tokens};

  for (int64_t begin = 0; begin < p.num_tokens; begin += launch.tokens) {
    const int64_t after = p.num_tokens - begin;
    const int tokens = after < launch.tokens ? static_cast<int>(after) : launch.tokens;

    // load q, k, v
#pragma unroll 2
    for (int i = thread; i < tokens * kHeadDim; i += kDecodeThreads) {
      const int token = i / kHeadDim, d = i % kHeadDim;
      const bool live = d < p.head_dim;
      const int64_t row = begin + token;
      shared.q(token)[d] = live ? device::widen(q_rows[row * p.q.seq_stride + d]) : 0.0f;
      shared.k(token)[d] = live ? device::widen(k_rows[row * p.k.seq_stride + d]) : 0.0f;
    }
#pragma unroll 1
    for (int i = thread; i < tokens * kDecodeColumns; i += kDecodeThreads) {
      const int token = i / kDecodeColumns, column = i % kDecodeColumns;
      float x = launch.of_z ? 1.0f : 0.0f;
      if (!launch.of_z && column < num_columns) {
        x = device::widen(v_rows[(begin + token) * p.v.seq_stride + column]);
      }
      shared.v(token)[column] = x;
    }
    if (thread < tokens) {
      shared.decay(thread) = static_cast<float>(
          exp(log_decay_at(p.log_decay, batch, p.num_q_heads, head, p.num_tokens, begin + thread)));
    }
    device::sync_threads();

#pragma unroll 1
    for (int token = 0; token < tokens; ++token) {
      // state = decay state + k v^T; sums = q^T state
      const float decay = shared.decay(token);
      if (decay == 0.0f) state.forget();
      float v[kDecodeOwn], sums[kDecodeOwn] = {};
#pragma unroll
      for (int i = 0; i < kDecodeOwn; ++i) v[i] = shared.v(token)[state.column(i)];
      state.step(shared.q(token), shared.k(token), v, decay, sums);
      if (begin + token + 1 == kept) state.store();
#pragma unroll
      for (int i = 0; i < kDecodeOwn; ++i) {
#pragma unroll
        for (int mask = kDecodeRowThreads; mask < device::kWarpSize; mask *= 2) {
          sums[i] += device::shuffle_xor(sums[i], mask);
        }
      }
      if (device::lane_index() < kDecodeRowThreads) {
        float* to = shared.sums(token, thread / device::kWarpSize);
#pragma unroll
        for (int i = 0; i < kDecodeOwn; ++i) to[state.column(i)] = sums[i];
      }
    }
    device::sync_threads();

    // write out
#pragma unroll 1
    for (int i = thread; i < tokens * kDecodeColumns; i += kDecodeThreads) {
      const int token = i / kDecodeColumns, column = i % kDecodeColumns;
      if (column >= num_columns) continue;
      float acc = 0;
      for (int warp = 0; warp < kDecodeWarps; ++warp) acc += shared.sums(token, warp)[column];
      const int64_t row = begin + token;
      if (launch.of_z) {
        launch.denominators[first_output + row] = acc + static_cast<float>(p.eps);
        continue;
      }
      float scale = static_cast<float>(p.scale);
      if (launch.denominators != nullptr) scale /= launch.denominators[first_output + row];
      device::narrow(acc * scale, out[row * p.out.seq_stride + column]);
    }
  }
}

}  // namespace longctx::cuda
