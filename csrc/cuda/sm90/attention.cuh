// attention and block_sparse_attention on Hopper: flash attention with TMA loads and WGMMA, in the
// warp-specialised form of FlashAttention-3 (Shah et al., 2024).
//
// One warp of the first warpgroup produces, two warpgroups of 64 rows each consume; tile i lies in
// stage i % kStages of the rings of K and V:
//   producer   walk i | wait K empty i | load K i | wait V empty i | load V i | walk i + 1 ...
//   consumer   wait K i + 1, turn | issue S' = Q K(i + 1) | wait V i | issue O += P V(i) | pass
//   turn
//              wait S' | free K i + 1 | mask, softmax S' -> P', clear what is dead of V(i + 1)
//              wait O  | free V i     | O *= factor, P = P'
// Whoever frees K i + 1 has done with the positions of tile i, so that before it loads K i the
// producer may overwrite those of i - kStages - 2: kStages + 2 sets of them. Tile 0 has no
// product to run beside; the last product has no scores.
//
// Floor per tile of 128 x 128 (128 x 64) at head_dim D, for 4096 FLOP and 16 exponentials a cycle:
//   D = 64: 1024 cycles of WGMMA, 1024 of exponentials, 32 KiB from L2; both bind
//   D = 128: 2048, 1024, 64 KiB: WGMMA binds
//   D = 256: 2048, 512, 64 KiB: WGMMA binds, and S = Q K reads shared memory at its 128 bytes a
//   cycle
#pragma once
#include "cuda/runtime.h"
#include "cuda/sm90/producer.cuh"
#include "cuda/sm90/softmax.cuh"

namespace longctx::cuda::sm90 {

// ---- consumers: a warpgroup for 64 rows ----

// s = q k^T
template <class T, int kHeadDim, int n>
LONGCTX_DEVICE void issue_scores(float (&s)[n], uint64_t q, uint64_t k) {
  using Shape = Tile<kHeadDim>;
  constexpr int kStepBytes = 32;  // of 16 columns
  q = device::opaque(q);          // else every step's descriptor takes two registers for good
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    const int panel = step / 4, within = step % 4 * kStepBytes;
    device::wgmma<T>(s, device::advance(q, panel * Shape::kRowPanelBytes + within),
                     device::advance(k, panel * Shape::kKeyPanelBytes + within), step > 0);
  }
}

// acc += p v
template <class T, int n, int kSteps>
LONGCTX_DEVICE void issue_values(float (&acc)[n], const uint32_t (&p)[kSteps][4], uint64_t v) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    device::wgmma<T>(acc, p[step], device::advance(v, step * 16 * device::kPanelBytes));
  }
}

template <class T, int kHeadDim>
class Consumer {
 public:
  using Shape = Tile<kHeadDim>;

  LONGCTX_DEVICE Consumer(SharedMemory<kHeadDim>& shared, const AttentionTask& task, int warpgroup)
      : shared_(shared),
        task_(task),
        warpgroup_(warpgroup),
        takes_turns_(Shape::kTurns && shared.consumers > 1),
        turn_(warpgroup == 0) {
    const int thread = device::thread_index() % device::kWarpgroupSize;
    first_row_ = warpgroup * 64 + thread / device::kWarpSize * 16 + thread % device::kWarpSize / 4;
    first_column_ = thread % 4 * 2;
    q_ = device::operand_descriptor(
        device::shared_address(shared.q[0] + warpgroup * 64 * device::kPanelBytes),
        Shape::kRowPanelBytes);
  }

  LONGCTX_DEVICE void run() {
    float acc[kHeadDim / 2];
#pragma unroll
    for (float& x : acc) x = 0.0f;
    device::mbarrier_wait(&shared_.q_full, 0);
    if (arrived(next_)) {
      uint32_t p[Shape::kKeys / 16][4];
      first_tile(p);
      while (arrived(next_)) step(acc, p);
      last_tile(acc, p);
    }
    write_out(acc);
  }

 private:
  using Scores = float[Shape::kKeys / 2];
  using Weights = uint32_t[Shape::kKeys / 16][4];
  using Values = float[kHeadDim / 2];
  using At = Place<Shape::kStages>;

  LONGCTX_DEVICE const KeyTile<Shape::kKeys>& tile() const { return shared_.tiles[tile_.stage]; }
  LONGCTX_DEVICE uint64_t keys(const At& at) const {
    return device::operand_descriptor(device::shared_address(shared_.k[at.stage]),
                                      Shape::kKeyPanelBytes);
  }
  LONGCTX_DEVICE uint64_t values(const At& at) const {
    return device::operand_descriptor(device::shared_address(shared_.v[at.stage]),
                                      Shape::kKeyPanelBytes);
  }

  // Whether there is one more tile, the one that tile() names.
  LONGCTX_DEVICE bool arrived(const At& at) {
    device::mbarrier_wait(&shared_.k_full[at.stage], at.parity);
    return tile().exists();
  }
  // For the whole warp.
  LONGCTX_DEVICE void arrive(uint64_t* mbarrier) {
    device::sync_warp();
    if (device::lane_index() == 0) device::mbarrier_arrive(mbarrier);
  }

  LONGCTX_DEVICE void first_tile(Weights& p) {
    Scores s;
    device::wgmma_fence();
    issue_scores<T, kHeadDim>(s, q_, keys(next_));
    device::wgmma_commit();
    device::wgmma_wait<0>();
    device::pin(s);
    arrive(&shared_.k_empty[next_.stage]);
    float factor[2];
    soften(s, factor);  // nothing to rescale yet
    pack_weights<T>(s, p);
    clear_dead_values(next_);
    next_.advance();
    tile_.advance();
  }

  LONGCTX_DEVICE void step(Values& acc, Weights& p) {
    Scores s;
    if (takes_turns_) device::mbarrier_wait(&shared_.turn[warpgroup_], turn_);
    device::pin(acc);
    device::wgmma_fence();
    issue_scores<T, kHeadDim>(s, q_, keys(next_));
    device::wgmma_commit();
    device::mbarrier_wait(&shared_.v_full[now_.stage], now_.parity);
    device::wgmma_fence();
    issue_values<T>(acc, p, values(now_));
    device::wgmma_commit();
    if (takes_turns_) arrive(&shared_.turn[1 - warpgroup_]);
    turn_ ^= 1;
    device::wgmma_wait<1>();
    device::pin(s);
    arrive(&shared_.k_empty[next_.stage]);
    float factor[2];
    const bool rescales = soften(s, factor);
    device::pin(s);  // before the branch, so that no exponential sinks below the wait
    clear_dead_values(next_);
    device::wgmma_wait<0>();
    device::pin(acc);
    arrive(&shared_.v_empty[now_.stage]);
    if (rescales) {
#pragma unroll
      for (int e = 0; e < kHeadDim / 2; ++e) acc[e] *= factor[e % 4 / 2];
    }
    pack_weights<T>(s, p);
    now_.advance();
    next_.advance();
    tile_.advance();
  }

  LONGCTX_DEVICE void last_tile(Values& acc, Weights& p) {
    device::mbarrier_wait(&shared_.v_full[now_.stage], now_.parity);
    device::pin(acc);
    device::wgmma_fence();
    issue_values<T>(acc, p, values(now_));
    device::wgmma_commit();
    device::wgmma_wait<0>();
    device::pin(acc);
  }

  // mask, softmax update
  LONGCTX_DEVICE bool soften(Scores& s, float (&factor)[2]) {
    const bool scaled = !task_.scale.monotone();
    if (task_.scale.cap_log2 > 0) {
#pragma unroll
      for (float& x : s) x = task_.scale.apply(x);
    } else if (scaled) {
#pragma unroll
      for (float& x : s) x *= task_.scale.scale_log2;
    }
    if (tile().partial()) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const SpanMask row(shared_.mask.rows[item_row(first_row_ + 8 * i)]);
        mask_row(s, i, tile().positions + first_column_, row);
      }
    }
    return rows_.update(s, scaled ? 1.0f : task_.scale.scale_log2, factor);
  }

  // The item's row of a pair; some row for pairs that are not there and never written.
  LONGCTX_DEVICE int item_row(int pair) const {
    const int row = pair % static_cast<int>(task_.grid.block_rows);
    return row < shared_.item.num_rows ? row : shared_.item.num_rows - 1;
  }

  // Values that no row sees may be anything, and 0 * NaN would stay. All consumers read them: each
  // clears a part.
  LONGCTX_DEVICE void clear_dead_values(const At& at) {
    if (!tile().partial()) return;
    device::mbarrier_wait(&shared_.v_full[at.stage], at.parity);
    constexpr int kUnits = device::kPanelBytes / sizeof(uint4);
    const int thread = device::thread_index() - device::kWarpgroupSize;
    const int num_threads = shared_.consumers * device::kWarpgroupSize;
    for (int slot = thread / kUnits; slot < Shape::kKeys; slot += num_threads / kUnits) {
      if (tile().positions[slot] >= 0) continue;
#pragma unroll
      for (int panel = 0; panel < Shape::kPanels; ++panel) {
        char* const row = shared_.v[at.stage][panel] + slot * device::kPanelBytes;
        reinterpret_cast<uint4*>(row)[thread % kUnits] = uint4{};
      }
    }
    device::fence_async_proxy();
    device::sync_named(1, num_threads);
  }

  // write out, lse
  LONGCTX_DEVICE void write_out(const Values& acc) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = quad_sum(rows_.sum[i]);
      const Item& item = shared_.item;
      const int pair = first_row_ + 8 * i, block_rows = static_cast<int>(task_.grid.block_rows);
      const int row = pair % block_rows, item_head = pair / block_rows;
      if (row >= item.num_rows || item_head >= item.num_heads) continue;
      const AttentionParams& p = task_.p;
      const int64_t head = item.first_head + item_head;
      const int64_t q_row = item.seq.q_begin + item.row_begin + row;
      const int64_t index = (item.seq.batch_index * p.num_q_heads + head) * p.seqs.seqlen_q + q_row;
      const int64_t split = item.split * p.seqs.batch * p.num_q_heads * p.seqs.seqlen_q + index;
      const bool whole = task_.partials.lse == nullptr;
      const float sink = whole && p.sinks != nullptr ? p.sinks[head] : -INFINITY;
      const RowResult result = finish_row(rows_.reference[i] * kLn2, sum, sink);
      if (first_column_ == 0) {
        (whole ? static_cast<float*>(p.lse) + index : task_.partials.lse + split)[0] = result.lse;
      }
      T* const out = static_cast<T*>(p.out.data) + item.seq.batch_index * p.out.batch_stride +
                     head * p.out.head_stride + q_row * p.out.seq_stride;
      float* const split_out = task_.partials.out + (whole ? 0 : split * p.head_dim_v);
#pragma unroll
      for (int e = 0; e < kHeadDim / 2; e += 4) {
        const int column = 2 * e + first_column_;
        if (column >= p.head_dim_v) continue;
        const float low = sum == 0 ? 0.0f : acc[e + 2 * i] * result.factor;
        const float high = sum == 0 ? 0.0f : acc[e + 2 * i + 1] * result.factor;
        if (whole) {
          *reinterpret_cast<uint32_t*>(out + column) = device::pack_pair(T(), low, high);
        } else {
          *reinterpret_cast<float2*>(split_out + column) = float2{low, high};
        }
      }
    }
  }

  SharedMemory<kHeadDim>& shared_;
  const AttentionTask& task_;
  uint64_t q_;
  int warpgroup_, first_row_, first_column_;
  bool takes_turns_;
  uint32_t turn_;              // parity of the phase that gives this warpgroup its turn
  At now_, next_;              // the tile of P V, and that of S'
  Place<Shape::kTiles> tile_;  // of S'
  RowPair rows_;
};

// ---- kernel ----

template <int kHeadDim>
LONGCTX_DEVICE void init_barriers(SharedMemory<kHeadDim>& shared) {
  constexpr int kWarps = device::kWarpgroupSize / device::kWarpSize;
  device::mbarrier_init(&shared.q_full, 1);
  for (int stage = 0; stage < Tile<kHeadDim>::kStages; ++stage) {
    device::mbarrier_init(&shared.k_full[stage], 1);
    device::mbarrier_init(&shared.v_full[stage], 1);
    device::mbarrier_init(&shared.k_empty[stage], shared.consumers * kWarps);
    device::mbarrier_init(&shared.v_empty[stage], shared.consumers * kWarps);
  }
  for (uint64_t& turn : shared.turn) device::mbarrier_init(&turn, kWarps);
  device::fence_mbarrier_init();
}

template <class T, int kHeadDim>
LONGCTX_KERNEL(Tile<kHeadDim>::kThreads, 1)
attention_kernel(LONGCTX_GRID_CONSTANT const AttentionMaps maps,
                 LONGCTX_GRID_CONSTANT const AttentionTask task) {
  auto& shared = *reinterpret_cast<SharedMemory<kHeadDim>*>(device::shared_memory());
  const int warp = device::warp_index();
  if (warp == 0) {
    // In shared memory, because the consumers have no registers to spare.
    const Item item = item_at(task.p, task.block_list(), task.grid, device::block_index());
    if (device::lane_index() == 0) {
      shared.item = item;
      const int last_pair =
          (item.num_heads - 1) * static_cast<int>(task.grid.block_rows) + item.num_rows - 1;
      shared.consumers = last_pair / Tile<kHeadDim>::kConsumerRows + 1;
      init_barriers(shared);
      device::prefetch_map(&maps.q);
      device::prefetch_map(&maps.k);
      device::prefetch_map(&maps.v);
    }
  }
  device::sync_threads();
  const Item& item = shared.item;
  if (item.num_rows == 0) return;
  shared.mask.init_rows(task.p.mask, item);
  device::sync_threads();
  if (warp < 4) {
    device::lower_registers<Tile<kHeadDim>::kProducerRegisters>();
    if (warp == 0) produce(shared, maps, task);
  } else if (warp / 4 <= shared.consumers) {
    device::raise_registers<Tile<kHeadDim>::kConsumerRegisters>();
    Consumer<T, kHeadDim>(shared, task, warp / 4 - 1).run();
  }
}

template <class T, int head_dim>
int64_t attention_shared_bytes() {
  static_assert(sizeof(SharedMemory<head_dim>) <= 227 * 1024);
  return sizeof(SharedMemory<head_dim>);
}

template <class T, int head_dim>
void launch_attention(const AttentionParams& params, const BlockList* blocks,
                      const AttentionPlan& plan) {
  using Shape = Tile<head_dim>;
  const int64_t box_keys = blocks != nullptr && blocks->block_size_k < Shape::kKeys
                               ? blocks->block_size_k
                               : Shape::kKeys;
  const SequenceParams& seqs = params.seqs;
  const AttentionMaps maps = {tensor_map(params.dtype, params.q, seqs.batch, params.num_q_heads,
                                         seqs.seqlen_q, params.head_dim, plan.grid.block_rows),
                              tensor_map(params.dtype, params.k, seqs.batch, params.num_kv_heads,
                                         seqs.seqlen_k, params.head_dim, box_keys),
                              tensor_map(params.dtype, params.v, seqs.batch, params.num_kv_heads,
                                         seqs.seqlen_k, params.head_dim_v, box_keys)};
  AttentionTask task;
  task.p = params;
  if (blocks != nullptr) task.blocks = *blocks;
  task.grid = plan.grid;
  task.scale = score_scale(params.softmax_scale, params.softcap);
  task.partials = plan.partials;
  task.box_keys = static_cast<int>(box_keys);
  launch(plan.op, &attention_kernel<T, head_dim>,
         dim3(static_cast<unsigned>(num_items(params, blocks, plan.grid))), Shape::kThreads,
         attention_shared_bytes<T, head_dim>(), maps, task);
}

}  // namespace longctx::cuda::sm90
