// The probabilities of attention, summed over the query rows: per key (or segment of keys) and per
// diagonal. Rows are counted from the sequence's last one backwards, so that a key's slot plus its
// row in the tile is their diagonal.
//
// A block of threads walks the query tiles. Beside each it visits a strip of up to kMaxStripTiles
// tiles of keys: always the same keys where it sums keys, or the strip that the same diagonals
// cross where it sums diagonals. Sums over a strip of diagonals overlap those of the next strip by
// kTileRows - 1; a second kernel adds them. While there is one query tile (the last rows of a
// prompt, which is what sparse methods ask for) both walks are the same: one pass sums both.
//
// Floor, per head: 2 * seqlen_q * seqlen_k * head_dim FLOPs (half of it when causal and square) and
// as many exponentials as there are pairs; memory reads k once per group of heads (heads of a group
// run side by side and share it in the L2 cache) and writes 4 bytes a key and a diagonal. 128 bf16
// rows of head_dim 128 are 128 FLOPs for each byte of k and head: tensor cores limit it.
#pragma once
#include "cuda/score_tile.cuh"
#include "cuda/slots.cuh"
#include "cuda/visit.cuh"

namespace longctx::cuda {

constexpr int kMassKeys = 64;  // keys of a tile
constexpr int kMaxStripTiles = 8;
constexpr int kMassThreads = ScoreTile<float, kMassKeys>::kThreads;
constexpr int kMassWarps = kMassThreads / device::kWarpSize;

struct MassGrid {
  int strip_tiles = 0;            // tiles of a strip
  bool follow_diagonals = false;  // strips of diagonals, else of keys
  int64_t slots = 0;              // strips of the axis, cut by sequences
  float* key_mass = nullptr;      // [batch, num_q_heads, seqlen_k], or null: not summed
  float* windows = nullptr;       // [batch, num_q_heads, slots, window_size()], or null
  int num_slices = 0;             // of a row of q and k
  int q_slots = 0;                // slices of q in shared memory: all of them, or kStages
  bool q_aligned = false;
  bool k_aligned = false;

  LONGCTX_HD int64_t strip_size() const { return int64_t{strip_tiles} * kMassKeys; }
  LONGCTX_HD int64_t window_size() const { return strip_size() + kTileRows; }
  // All of q stays while the strip goes by.
  LONGCTX_HD bool q_stays() const { return q_slots == num_slices; }
};

// Diagonals inside a tile of a warp: score (row, column) lies on diagonal row + column. Track g
// holds the sums over the rows 8 i + g; its element x + kPad is diagonal x + g.
struct WarpTracks {
  static constexpr int kDiagonals = 95;  // of 64 rows and 32 columns
  static constexpr int kPad = 8;         // zeros on both sides: what track g lacks
  static constexpr int kStride = 88 + 2 * kPad;
  alignas(16) float tracks[8][kStride];
  float sums[kDiagonals + 1];
};

struct MassShared {
  ItemMask<kTileRows> mask;
  uint64_t visible[kTileRows];    // keys of a tile, where they differ by row
  float lse_log2[kTileRows];      // -inf: the row counts for nothing
  float key_parts[2][kMassKeys];  // of a tile, by rows of warps
  float key_sums[kMaxStripTiles * kMassKeys];
  float window[kMaxStripTiles * kMassKeys + kTileRows];
  WarpTracks warps[kMassWarps];
};

constexpr int64_t mass_shared_bytes(int q_slots) {
  return q_slots * slice_bytes(kTileRows) + kStages * slice_bytes(kMassKeys) +
         static_cast<int64_t>(sizeof(MassShared));
}
static_assert(mass_shared_bytes(kStages) <= kLeastSharedMemory);

// Whether rows [row_begin, row_end) may see one of the keys [key_begin, key_end).
LONGCTX_DEVICE bool rows_may_see(const MaskParams& mask, const Sequence& seq, int64_t row_begin,
                                 int64_t row_end, int64_t key_begin, int64_t key_end) {
  const RowMask first = row_mask(mask, seq, row_begin), last = row_mask(mask, seq, row_end - 1);
  const Interval window{first.window.begin, last.window.end};
  return window.overlaps(key_begin, key_end) || last.sinks.overlaps(key_begin, key_end);
}

template <class T>
class MassBlock {
 public:
  LONGCTX_DEVICE MassBlock(const AttentionMassParams& p, const MassGrid& grid)
      : p_(p), grid_(grid) {
    char* memory = device::shared_memory();
    q_ = memory;
    k_ = q_ + grid.q_slots * slice_bytes(kTileRows);
    shared_ = reinterpret_cast<MassShared*>(k_ + kStages * slice_bytes(kMassKeys));
  }

  LONGCTX_DEVICE void run() {
    // heads of a group side by side
    int64_t index = device::block_index();
    const int64_t group_size = p_.num_q_heads / p_.num_kv_heads;
    const int64_t in_group = index % group_size;
    index /= group_size;
    slot_ = index % grid_.slots;
    index /= grid_.slots;
    kv_head_ = index % p_.num_kv_heads;
    head_ = kv_head_ * group_size + in_group;
    const auto span = [this](const Sequence& seq) {
      return grid_.follow_diagonals ? diagonal_span(seq) : key_span(seq);
    };
    const Piece piece = piece_at(p_.seqs, index / p_.num_kv_heads, slot_, grid_.strip_size(), span);
    if (piece.sequence < 0) return;
    seq_ = sequence_at(p_.seqs, piece.sequence);
    strip_begin_ = static_cast<int32_t>(piece.number * grid_.strip_size());
    clear_sums();
    int64_t first = 0, end = seq_.q_len;
    if (grid_.follow_diagonals) {
      first = clamp_index((strip_begin_ - seq_.k_len) / kTileRows * kTileRows, 0, end);
      end = clamp_index(strip_begin_ + grid_.strip_size(), 0, end);
    }
    for (; first < end; first += kTileRows) {
      if (!load_rows(first)) continue;
      device::sync_threads();
      visit_strip();
    }
    device::sync_threads();
    write_sums();
  }

 private:
  LONGCTX_DEVICE void clear_sums() {
    const int begin = device::thread_index();
    for (int i = begin; i < grid_.strip_size(); i += kMassThreads) shared_->key_sums[i] = 0.0f;
    for (int i = begin; i < grid_.window_size(); i += kMassThreads) shared_->window[i] = 0.0f;
    for (WarpTracks& warp : shared_->warps) {
      float* tracks = warp.tracks[0];
      for (int i = begin; i < 8 * WarpTracks::kStride; i += kMassThreads) tracks[i] = 0.0f;
    }
  }

  // The rows [first, first + kTileRows) counted backwards: their masks and lse. False when they see
  // nothing of the strip.
  LONGCTX_DEVICE bool load_rows(int64_t first) {
    num_rows_ = static_cast<int32_t>(clamp_index(seq_.q_len - first, 0, kTileRows));
    last_row_ = static_cast<int32_t>(seq_.q_len - 1 - first);
    first_key_ = static_cast<int32_t>(strip_begin_ - (grid_.follow_diagonals ? first : 0));
    const int64_t begin = clamp_index(first_key_, 0, seq_.k_len);
    const int64_t end = clamp_index(first_key_ + grid_.strip_size(), 0, seq_.k_len);
    const int64_t row_begin = last_row_ + 1 - num_rows_;
    if (begin >= end || !rows_may_see(p_.mask, seq_, row_begin, last_row_ + 1, begin, end)) {
      return false;
    }
    device::sync_threads();  // nobody still reads the last rows'
    Item item;
    item.seq = seq_;
    item.row_begin = row_begin;
    item.num_rows = num_rows_;
    shared_->mask.init_rows(p_.mask, item);
    for (int i = device::thread_index(); i < kTileRows; i += kMassThreads) {
      shared_->lse_log2[i] =
          load_lse(i < num_rows_ ? last_row_ - i : -1) * static_cast<float>(kLog2E);
    }
    device::sync_threads();
    if (device::warp_index() == 0) shared_->mask.init_extents();
    return true;
  }

  // The log of a row's softmax denominator; -inf for padding, which gives probability 0.
  LONGCTX_DEVICE float load_lse(int64_t row) const {
    constexpr float kInf = INFINITY;
    float lse = -kInf;
    if (row >= 0) {
      lse = static_cast<const float*>(
          p_.lse)[(seq_.batch_index * p_.num_q_heads + head_) * p_.seqs.seqlen_q + seq_.q_begin +
                  row];
    }
    if (p_.sinks != nullptr && lse > -kInf) {
      const float sink = p_.sinks[head_];
      const float top = lse > sink ? lse : sink;
      lse = top + logf(expf(lse - top) + expf(sink - top));
    }
    return lse;
  }

  // The tiles of keys of the strip that some row sees: a bit each.
  LONGCTX_DEVICE void visit_strip() {
    uint32_t tiles = 0, full = 0;
    for (int tile = 0; tile < grid_.strip_tiles; ++tile) {
      const int32_t key = first_key_ + tile * kMassKeys;
      const auto visibility = shared_->mask.visibility(key, key + kMassKeys);
      if (visibility != Visibility::kNone) tiles |= 1u << tile;
      if (visibility == Visibility::kFull) full |= 1u << tile;
    }
    if (tiles == 0) return;
    // load q tile; for each key tile that is seen
    const HeadRows q = head_rows<T>(p_.q, seq_.batch_index, head_, seq_.q_begin);
    const HeadRows k = head_rows<T>(p_.k, seq_.batch_index, kv_head_, seq_.k_begin);
    const int32_t k_len = static_cast<int32_t>(seq_.k_len);
    const int row_bytes = static_cast<int>(p_.head_dim * sizeof(T));
    const auto load_q = [&](int slice, int q_slot) {
      const auto row_at = [&](int i) { return i < num_rows_ ? q.row(last_row_ - i) : nullptr; };
      load_slice<T>(q_ + q_slot * slice_bytes(kTileRows), kTileRows, row_at, slice * kSliceBytes,
                    row_bytes, grid_.q_aligned);
    };
    if (grid_.q_stays()) {
      for (int slice = 0; slice < grid_.num_slices; ++slice) load_q(slice, slice);
    }
    uint32_t to_load = tiles, to_use = tiles;
    int load_at = 0, use_at = 0;  // slice of the first of them
    const auto load = [&](int, int stage) {
      const int32_t key = first_key_ + device::lowest_bit(to_load) * kMassKeys;
      const auto row_at = [&](int i) { return key + i < k_len ? k.row(key + i) : nullptr; };
      load_slice<T>(k_ + stage * slice_bytes(kMassKeys), kMassKeys, row_at, load_at * kSliceBytes,
                    row_bytes, grid_.k_aligned);
      if (!grid_.q_stays()) load_q(load_at, stage);
      if (++load_at == grid_.num_slices) {
        load_at = 0;
        to_load &= to_load - 1;
      }
    };
    // s = q k^T; p = exp(s - lse)
    ScoreTile<T, kMassKeys> scores;
    const auto use = [&](int, int stage) {
      if (use_at == 0) scores.clear();
      scores.add_slice(q_ + (grid_.q_stays() ? use_at : stage) * slice_bytes(kTileRows),
                       k_ + stage * slice_bytes(kMassKeys));
      if (++use_at < grid_.num_slices) return;
      use_at = 0;
      const int tile = device::lowest_bit(to_use);
      to_use &= to_use - 1;
      turn_into_probabilities(tile, (full >> tile & 1) != 0, scores);
      add_probabilities(tile, scores);
    };
    for_each_slice(device::count_bits(tiles) * grid_.num_slices, load, use);
  }

  LONGCTX_DEVICE void turn_into_probabilities(int tile, bool full,
                                              ScoreTile<T, kMassKeys>& scores) const {
    const float scale_log2 = static_cast<float>(p_.softmax_scale * kLog2E);
    if (p_.softcap > 0) {
      const float inner = static_cast<float>(p_.softmax_scale / p_.softcap);
      const float outer = static_cast<float>(p_.softcap * kLog2E);
      scores.for_each([&](int, int, float& s) { s = outer * tanhf(s * inner); });
    } else {
      scores.for_each([&](int, int, float& s) { s *= scale_log2; });
    }
    scores.for_each([&](int row, int, float& s) {
      const float lse_log2 = shared_->lse_log2[row];
      s = lse_log2 != -INFINITY ? device::exp2_fast(s - lse_log2) : 0.0f;
    });
    if (full) return;
    // mask
    const int row = device::thread_index();  // a thread a row
    uint64_t visible = 0;
    if (row < num_rows_) {
      visible =
          visible_keys(shared_->mask.rows[num_rows_ - 1 - row], first_key_ + tile * kMassKeys);
    }
    shared_->visible[row] = visible;
    device::sync_threads();
    scores.for_each([&](int row, int column, float& s) {
      if ((shared_->visible[row] >> column & 1) == 0) s = 0.0f;
    });
  }

  // Bit i: the row sees key first_key + i.
  LONGCTX_DEVICE static uint64_t visible_keys(const RowMask32& row, int32_t first_key) {
    const auto keys_in = [first_key](const Interval32& part) {
      const int64_t begin = clamp_index(part.begin - first_key, 0, kMassKeys);
      const int64_t end = clamp_index(part.end - first_key, 0, kMassKeys);
      return begin < end ? ~uint64_t{0} >> (kMassKeys - (end - begin)) << begin : 0;
    };
    return (keys_in(row.window) | keys_in(row.sinks)) &
           (keys_in(row.ranges[0]) | keys_in(row.ranges[1]));
  }

  LONGCTX_DEVICE void add_probabilities(int tile, const ScoreTile<T, kMassKeys>& scores) {
    if (grid_.key_mass != nullptr) sum_rows(scores);
    if (grid_.windows != nullptr) sum_diagonals(scores);
    device::sync_threads();
    const int thread = device::thread_index();
    if (grid_.key_mass != nullptr && thread < kMassKeys) {
      shared_->key_sums[tile * kMassKeys + thread] +=
          shared_->key_parts[0][thread] + shared_->key_parts[1][thread];
    }
    if (grid_.windows == nullptr) return;
    for (int i = thread; i < kTileRows + kMassKeys - 1; i += kMassThreads) {
      float sum = 0.0f;
      for (int warp = 0; warp < kMassWarps; ++warp) {
        const int diagonal = i - 64 * (warp % 2) - 32 * (warp / 2);
        if (diagonal >= 0 && diagonal < WarpTracks::kDiagonals) {
          sum += shared_->warps[warp].sums[diagonal];
        }
      }
      shared_->window[tile * kMassKeys + i] += sum;
    }
  }

  // key_parts: every column summed over the rows of the warp.
  LONGCTX_DEVICE void sum_rows(const ScoreTile<T, kMassKeys>& scores) {
    float sums[8];  // of the thread's columns, 2 n + i
#pragma unroll
    for (int column = 0; column < 8; ++column) {
      float sum = 0.0f;
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        sum += scores.s[m][column / 2][column % 2] + scores.s[m][column / 2][2 + column % 2];
      }
      sums[column] = sum;
    }
    // Lanes with the same columns halve them among each other: lane group g ends up with sums[g].
    const int g = device::lane_index() / 4;
#pragma unroll
    for (int half = 4; half > 0; half /= 2) {
      const bool upper = (g & half) != 0;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const float given = upper ? sums[i] : sums[i + half];
        const float kept = upper ? sums[i + half] : sums[i];
        sums[i] = kept + device::shuffle_xor(given, 4 * half);
      }
    }
    shared_->key_parts[scores.warp_row()][scores.column(g / 2, g % 2)] = sums[0];
  }

  // Sums the diagonals of the warp's 64 x 32 scores. Rows 8 i + g and columns 8 n + c lie on
  // diagonal 8 (i + n) + g + c, so that a thread first sums over i + n.
  LONGCTX_DEVICE void sum_diagonals(const ScoreTile<T, kMassKeys>& scores) {
    WarpTracks& warp = shared_->warps[device::thread_index() / device::kWarpSize];
    const int lane = device::lane_index();
    float2* track = reinterpret_cast<float2*>(&warp.tracks[lane / 4][WarpTracks::kPad]);
#pragma unroll
    for (int u = 0; u < 11; ++u) {
      float2 sum = {0.0f, 0.0f};
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int i = u - n;  // m = i / 2
        if (i < 0 || i >= 8) continue;
        sum.x += scores.s[i / 2][n][i % 2 * 2];
        sum.y += scores.s[i / 2][n][i % 2 * 2 + 1];
      }
      track[4 * u + lane % 4] = sum;
    }
    device::sync_warp();
#pragma unroll
    for (int diagonal = lane; diagonal < WarpTracks::kDiagonals; diagonal += device::kWarpSize) {
      float sum = 0.0f;
#pragma unroll
      for (int g = 0; g < 8; ++g) sum += warp.tracks[g][WarpTracks::kPad + diagonal - g];
      warp.sums[diagonal] = sum;
    }
  }

  LONGCTX_DEVICE void write_sums() const {
    const int64_t map = seq_.batch_index * p_.num_q_heads + head_;
    if (grid_.key_mass != nullptr) {
      // What lies behind the keys in use is 0 and belongs to nobody else.
      const int64_t end = p_.seqs.cu_seqlens_q == nullptr ? p_.seqs.seqlen_k : seq_.k_len;
      float* mass = grid_.key_mass + map * p_.seqs.seqlen_k + seq_.k_begin + strip_begin_;
      for (int64_t i = device::thread_index(); i < grid_.strip_size(); i += kMassThreads) {
        if (strip_begin_ + i < end) mass[i] = shared_->key_sums[i];
      }
    }
    if (grid_.windows != nullptr) {
      float* window = grid_.windows + (map * grid_.slots + slot_) * grid_.window_size();
      for (int i = device::thread_index(); i < grid_.window_size(); i += kMassThreads) {
        window[i] = shared_->window[i];
      }
    }
  }

  static constexpr double kLog2E = 1.4426950408889634;

  const AttentionMassParams& p_;
  const MassGrid& grid_;
  char* q_;  // [q_slots] slices of [kTileRows]
  char* k_;  // [kStages] slices of [kMassKeys]
  MassShared* shared_;

  Sequence seq_;
  int64_t slot_, head_, kv_head_;
  int32_t strip_begin_;  // key or diagonal of the sequence
  int32_t last_row_ = 0, first_key_ = 0;
  int32_t num_rows_ = 0;
};

template <class T>
LONGCTX_KERNEL(kMassThreads, 2)
attention_mass_kernel(const AttentionMassParams p, const MassGrid grid) {
  MassBlock<T>(p, grid).run();
}

}  // namespace longctx::cuda
