// The strip engine on vector registers, written once over Vec<T>: a vector holds queries, keys and
// values are broadcast. Keys are taken kStepKeys at a time: scores, softmax, values; the scores of
// a step stay in the L1 cache.
// Include after one vec_<isa>.h. Everything here has internal linkage, so that code compiled for
// one instruction set is never linked into another.
#pragma once
#include <math.h>

#include <cstdint>
#include <limits>
#include <type_traits>

#include "longctx/mask.h"
#include "reduced_float.h"
#include "strip_engine.h"
#include "strip_products.h"

namespace longctx::cpu {
namespace {

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

template <class In, class T>
inline void widen_row(const In* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}

// Rows that are about to be read (or written) column block by column block, all at once: their
// cache misses then overlap.
template <bool kWrite>
inline void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(static_cast<const char*>(row) + i, kWrite, 2);
  }
}

// Brings the rows of the chunk that is packed next into the L2 cache, one key at a time.
class Prefetcher {
 public:
  Prefetcher(const KeyChunk::Upcoming& upcoming, int64_t k_bytes, int64_t v_bytes)
      : upcoming_(upcoming), k_bytes_(k_bytes), v_bytes_(v_bytes) {}
  void next() {
    if (upcoming_.begin >= upcoming_.end) return;
    prefetch_row<false>(upcoming_.chunk->k_rows[upcoming_.begin], k_bytes_);
    prefetch_row<false>(upcoming_.chunk->v_rows[upcoming_.begin], v_bytes_);
    ++upcoming_.begin;
  }

 private:
  KeyChunk::Upcoming upcoming_;
  int64_t k_bytes_;
  int64_t v_bytes_;
};

// T: what is computed in; In: the dtype of q, k, v and out.
template <class T, class In>
struct VectorStrip {
  using V = Vec<T>;
  using Products = StripProducts<T>;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kVecs = kStripRows / kLanes;
  // Keys per softmax step: S^T, Q^T and O^T of head_dim 128 share the L1 cache.
  static constexpr int kStepTiles = 4;
  static constexpr int kStepKeys = kStepTiles * kKeyTile;
  static constexpr T kInf = std::numeric_limits<T>::infinity();

  struct State {
    explicit State(void* memory)
        : reference(static_cast<T*>(memory)),
          row_sum(reference + kStripRows),
          out_t(row_sum + kStripRows) {}
    T* reference;  // [kStripRows] maximum of s when last raised; -inf: nothing seen
    T* row_sum;    // [kStripRows] sum of exp(s - reference)
    T* out_t;      // [head_dim_v][kStripRows], relative to the same reference
  };

  // The keys of one softmax step that at least one row sees; no other row of K or V is read.
  struct Step {
    int count = 0;
    bool masked = false;
    const T* k_rows[kStepKeys];
    const T* v_rows[kStepKeys];
    uint32_t visible[kStepKeys];
  };

  static int64_t query_bytes(const StripShape& shape) {
    return sizeof(T) * kStripRows * shape.head_dim;
  }
  static int64_t chunk_bytes(const StripShape& shape) {
    return sizeof(T) * kChunkKeys * (shape.head_dim + value_stride(shape));
  }
  static int64_t state_bytes(const StripShape& shape) {
    return sizeof(T) * kStripRows * (2 + shape.head_dim_v);
  }
  static void begin_thread() {}
  static void end_thread() {}

  // Q^T [head_dim][kStripRows], scaled.
  static void pack_queries(const StripShape& shape, const void* const* rows, int num_rows,
                           void* queries) {
    T* q_t = static_cast<T*>(queries);
    const V scale = V::broadcast(static_cast<T>(shape.softmax_scale));
    for (int r = 0; r < num_rows; ++r) prefetch_row<false>(rows[r], sizeof(In) * shape.head_dim);
    for (int64_t d = 0; d < shape.head_dim; d += kLanes) {
      const int64_t cols = min_of(kLanes, shape.head_dim - d);
      for (int r = 0; r < kStripRows; r += kLanes) {
        V x[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          x[i] = V::broadcast(0);
          if (r + i < num_rows)
            x[i] = load_row(static_cast<const In*>(rows[r + i]) + d, cols) * scale;
        }
        transpose(x);
        for (int i = 0; i < cols; ++i) x[i].store(q_t + (d + i) * kStripRows + r);
      }
    }
  }

  // K [kChunkKeys][head_dim], then V [kChunkKeys][value_stride].
  static void pack_chunk(const StripShape& shape, const KeyChunk& chunk, bool with_values,
                         void* packed) {
    const int64_t num_slots = chunk.num_slots();
    T* k = static_cast<T*>(packed);
    for (int64_t slot = 0; slot < num_slots; ++slot) {
      widen_row(static_cast<const In*>(chunk.k_rows[slot]), shape.head_dim,
                k + slot * shape.head_dim);
    }
    if (!with_values) return;
    T* v = k + kChunkKeys * shape.head_dim;
    for (int64_t slot = 0; slot < num_slots; ++slot) {
      widen_row(static_cast<const In*>(chunk.v_rows[slot]), shape.head_dim_v,
                v + slot * value_stride(shape));
    }
  }

  static void reset(const StripShape& shape, void* state) {
    const State st(state);
    for (int r = 0; r < kStripRows; ++r) st.reference[r] = -kInf;
    for (int r = 0; r < kStripRows; ++r) st.row_sum[r] = 0;
    for (int64_t i = 0; i < shape.head_dim_v * kStripRows; ++i) st.out_t[i] = 0;
  }

  static void accumulate(const StripShape& shape, const void* queries, const KeyChunk& chunk,
                         const void* packed, const ChunkMask& mask, void* state) {
    const State st(state);
    const T* q_t = static_cast<const T*>(queries);
    const int num_tiles = static_cast<int>(chunk.num_slots() / kKeyTile);
    Prefetcher prefetcher(chunk.upcoming, sizeof(In) * shape.head_dim,
                          sizeof(In) * shape.head_dim_v);
    const auto prefetch = [&] { prefetcher.next(); };
    alignas(64) T s_t[kStepKeys * kStripRows];
    for (int tile = 0; tile < num_tiles;) {
      const Step step = collect_step(shape, packed, mask, num_tiles, tile);
      if (step.count == 0) continue;
      // s = q k^T
      Products::score_rows(step.k_rows, step.count, q_t, shape.head_dim, s_t, prefetch);
      if (shape.softcap > 0) apply_softcap(shape, step.count, s_t);
      // mask
      if (step.masked) mask_scores(step, s_t);
      // softmax update
      update_softmax(shape, step.count, s_t, st);
      // acc += p v
      Products::add_values(step.v_rows, step.count, s_t, shape.head_dim_v, st.out_t, prefetch);
    }
  }

  static void finish(const StripShape& shape, void* state, const float* sinks, int num_rows,
                     void* const* out_rows, void* lse) {
    const State st(state);
    alignas(64) T factors[kStripRows] = {};
    uint32_t seen = 0;  // bit r: row r saw a key
    for (int r = 0; r < num_rows; ++r) {
      prefetch_row<true>(out_rows[r], sizeof(In) * shape.head_dim_v);
      const T reference = st.reference[r];
      const T sum = st.row_sum[r];
      if (sum == 0) {
        static_cast<T*>(lse)[r] = -kInf;
        continue;
      }
      seen |= 1u << r;
      static_cast<T*>(lse)[r] = static_cast<T>(reference + ::log(sum));
      // The sink joins the denominator; both are taken relative to the larger of the two.
      double scale = 1;
      double denominator = sum;
      if (sinks != nullptr) {
        const double top = sinks[r] > reference ? sinks[r] : reference;
        scale = ::exp(reference - top);
        denominator = sum * scale + ::exp(sinks[r] - top);
      }
      factors[r] = static_cast<T>(scale / denominator);
    }
    for (int64_t d = 0; d < shape.head_dim_v; d += kLanes) {
      const int64_t cols = min_of(kLanes, shape.head_dim_v - d);
      for (int r = 0; r < num_rows; r += kLanes) {
        V x[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          const T* out = st.out_t + (d + (i < cols ? i : 0)) * kStripRows + r;
          x[i] = select(seen >> r, V::load(out) * V::load(factors + r), V::broadcast(0));
        }
        transpose(x);
        for (int i = 0; i < min_of(kLanes, num_rows - r); ++i) {
          store_row(x[i], static_cast<In*>(out_rows[r + i]) + d, cols);
        }
      }
    }
  }

  static void probabilities(const StripShape& shape, const void* queries, const KeyChunk& chunk,
                            const void* packed, const ChunkMask& mask, const void* lse, void* p_t) {
    const T* q_t = static_cast<const T*>(queries);
    const T* row_lse = static_cast<const T*>(lse);
    uint32_t live_rows = 0;
    alignas(64) T safe_lse[kStripRows];
    for (int r = 0; r < kStripRows; ++r) {
      const bool live = row_lse[r] != -kInf;
      live_rows |= static_cast<uint32_t>(live) << r;
      safe_lse[r] = live ? row_lse[r] : T(0);
    }
    Prefetcher prefetcher(chunk.upcoming, sizeof(In) * shape.head_dim, 0);
    for (int tile = 0; tile < chunk.num_slots() / kKeyTile; ++tile) {
      T* p = static_cast<T*>(p_t) + tile * kKeyTile * kStripRows;
      const auto visibility = static_cast<Visibility>(mask.tiles[tile]);
      if (visibility != Visibility::kNone) {
        const T* k_rows[kKeyTile];
        for (int i = 0; i < kKeyTile; ++i) k_rows[i] = k_row(shape, packed, tile * kKeyTile + i);
        Products::score_rows(k_rows, kKeyTile, q_t, shape.head_dim, p, [&] { prefetcher.next(); });
        if (shape.softcap > 0) apply_softcap(shape, kKeyTile, p);
      }
      for (int i = 0; i < kKeyTile; ++i, p += kStripRows) {
        uint32_t visible = visibility == Visibility::kNone ? 0 : live_rows;
        if (visibility == Visibility::kPartial) visible &= mask.visible[tile * kKeyTile + i];
        for (int j = 0; j < kStripRows; j += kLanes) {
          const V x = exp(V::load(p + j) - V::load(safe_lse + j));
          select(visible >> j, x, V::broadcast(0)).store(p + j);
        }
      }
    }
  }

  static void scores(const StripShape& shape, const void* queries, const KeyChunk& chunk,
                     const void* packed, void* s_t) {
    const T* q_t = static_cast<const T*>(queries);
    for (int tile = 0; tile < chunk.num_slots() / kKeyTile; ++tile) {
      const T* k_rows[kKeyTile];
      for (int i = 0; i < kKeyTile; ++i) k_rows[i] = k_row(shape, packed, tile * kKeyTile + i);
      T* s = static_cast<T*>(s_t) + tile * kKeyTile * kStripRows;
      Products::score_rows(k_rows, kKeyTile, q_t, shape.head_dim, s, [] {});
      if (shape.softcap > 0) apply_softcap(shape, kKeyTile, s);
    }
  }

 private:
  static V load_row(const In* from, int64_t cols) {
    if constexpr (std::is_same_v<In, T>) {
      if (cols == kLanes) return V::load(from);
    }
    alignas(64) T row[kLanes] = {};
    widen_row(from, cols, row);
    return V::load(row);
  }
  static void store_row(V x, In* to, int64_t cols) {
    if constexpr (std::is_same_v<In, T>) {
      if (cols == kLanes) return x.store(to);
    }
    alignas(64) T row[kLanes];
    x.store(row);
    for (int64_t i = 0; i < cols; ++i) narrow(row[i], to[i]);
  }

  static const T* k_row(const StripShape& shape, const void* packed, int64_t slot) {
    return static_cast<const T*>(packed) + slot * shape.head_dim;
  }
  static const T* v_row(const StripShape& shape, const void* packed, int64_t slot) {
    return static_cast<const T*>(packed) + kChunkKeys * shape.head_dim + slot * value_stride(shape);
  }
  // Values are read down their columns: an odd number of cache lines per row uses every cache set.
  static int64_t value_stride(const StripShape& shape) {
    constexpr int64_t kLine = 64 / sizeof(T);
    return ((shape.head_dim_v + kLine - 1) / kLine | 1) * kLine;
  }

  // The next kStepTiles tiles that are visible at all; advances `tile` past them.
  static Step collect_step(const StripShape& shape, const void* packed, const ChunkMask& mask,
                           int num_tiles, int& tile) {
    Step step;
    for (; tile < num_tiles && step.count <= kStepKeys - kKeyTile; ++tile) {
      const auto visibility = static_cast<Visibility>(mask.tiles[tile]);
      if (visibility == Visibility::kNone) continue;
      const bool partial = visibility == Visibility::kPartial;
      step.masked |= partial;
      for (int slot = tile * kKeyTile; slot < (tile + 1) * kKeyTile; ++slot) {
        const uint32_t visible = partial ? mask.visible[slot] : ~0u;
        if (visible == 0) continue;
        step.k_rows[step.count] = k_row(shape, packed, slot);
        step.v_rows[step.count] = v_row(shape, packed, slot);
        step.visible[step.count++] = visible;
      }
    }
    return step;
  }

  static void apply_softcap(const StripShape& shape, int count, T* s_t) {
    const V cap = V::broadcast(static_cast<T>(shape.softcap));
    const V inverse = V::broadcast(static_cast<T>(1 / shape.softcap));
    for (int i = 0; i < count * kStripRows; i += kLanes) {
      (cap * tanh(V::load(s_t + i) * inverse)).store(s_t + i);
    }
  }

  static void mask_scores(const Step& step, T* s_t) {
    for (int i = 0; i < step.count; ++i, s_t += kStripRows) {
      if (step.visible[i] == ~0u) continue;
      for (int j = 0; j < kStripRows; j += kLanes) {
        select(step.visible[i] >> j, V::load(s_t + j), V::broadcast(-kInf)).store(s_t + j);
      }
    }
  }

  // Turns s into exp(s - reference) in place. The reference follows the row's maximum only when
  // that has grown by kSlack: probabilities above 1 lose nothing, and rescaling becomes rare.
  static constexpr T kSlack = 5;
  static void update_softmax(const StripShape& shape, int count, T* s_t, const State& st) {
    V row_max[kVecs];
    for (int j = 0; j < kVecs; ++j) row_max[j] = V::broadcast(-kInf);
    for (int i = 0; i < count; ++i) {
      for (int j = 0; j < kVecs; ++j) {
        row_max[j] = max(V::load(s_t + i * kStripRows + j * kLanes), row_max[j]);
      }
    }
    for (int j = 0; j < kVecs; ++j) {
      const int lane = j * kLanes;
      if (any_greater(row_max[j], V::load(st.reference + lane) + V::broadcast(kSlack))) {
        raise_reference(row_max[j], lane, shape.head_dim_v, st);
      }
      const V reference = finite(V::load(st.reference + lane));
      // Summed apart first: one long chain of additions would lose a digit on thousands of keys.
      V step_sum = V::broadcast(0);
      for (int i = 0; i < count; ++i) {
        T* s = s_t + i * kStripRows + lane;
        const V p = exp(V::load(s) - reference);
        step_sum = step_sum + p;
        p.store(s);
      }
      (V::load(st.row_sum + lane) + step_sum).store(st.row_sum + lane);
    }
  }

  static void raise_reference(V row_max, int lane, int64_t head_dim_v, const State& st) {
    const V old = V::load(st.reference + lane);
    const V raised = max(row_max, old);
    raised.store(st.reference + lane);
    const V factor = exp(old - finite(raised));
    (V::load(st.row_sum + lane) * factor).store(st.row_sum + lane);
    for (int64_t d = 0; d < head_dim_v; ++d) {
      T* out = st.out_t + d * kStripRows + lane;
      (V::load(out) * factor).store(out);
    }
  }

  // The reference of a row that has seen nothing, -inf, cannot be subtracted.
  static V finite(V x) { return max(x, V::broadcast(std::numeric_limits<T>::lowest())); }
};

template <class T, class In>
constexpr StripEngine vector_engine(const char* name) {
  using Strip = VectorStrip<T, In>;
  return {name,
          Strip::query_bytes,
          Strip::chunk_bytes,
          Strip::state_bytes,
          Strip::begin_thread,
          Strip::end_thread,
          Strip::pack_queries,
          Strip::pack_chunk,
          Strip::reset,
          Strip::accumulate,
          Strip::finish,
          Strip::probabilities,
          Strip::scores};
}

}  // namespace
}  // namespace longctx::cpu
