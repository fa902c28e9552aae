// linear_attention and linear_attention_states on the CPU: chunked linear attention (Lightning
// Attention-2, Qin et al., 2024). A work item is a segment of a (sequence, head): a sweep over its
// chunks with the state in the L2 cache. Where heads are fewer than threads, the states of segments
// are computed first, each from zero, and scanned; then every segment knows where it starts.
// Reversed, the sweep steps from the last chunk to the first, and a chunk is its rows backwards.
// Non-causal attention without decay is one state for all rows; with decay it is a sweep forwards
// and one backwards, which keeps its rows until the other one adds them.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "flush_subnormals.h"
#include "kernels.h"
#include "linear_engine.h"
#include "linear_items.h"
#include "linear_weights.h"
#include "longctx/sequence.h"
#include "parallel.h"
#include "scratch.h"

namespace longctx::cpu {
namespace {

constexpr int64_t kStreamedBytes = 8 << 20;  // of out: more than an L2 cache keeps for its reader

template <class T>
class LinearSweep {
 public:
  explicit LinearSweep(const LinearAttentionParams& params)
      : params_(params),
        engine_(choose_linear_engine<T>(params.dtype, active_isa())),
        shape_{params.head_dim, params.head_dim_v, params.normalize},
        state_size_(params.head_dim * params.state_dim()),
        out_size_(params.wide_out ? static_cast<int64_t>(sizeof(T)) : element_size(params.dtype)) {}

  void run() {
    if (wants_rows()) prefer_huge_pages(params_.out.data, out_bytes());
    if (params_.chunk_states != nullptr) {
      prefer_huge_pages(params_.chunk_states, params_.seqs.batch * params_.num_q_heads *
                                                  params_.num_chunks * state_size_ * sizeof(T));
    }
    fill_unowned();
    make_items();
    const auto per_thread = [&] { return Thread(*this); };
    if (segment_states_ != nullptr) {
      // The last segment's state is computed by the sweep itself.
      for_each_item(static_cast<int64_t>(items_.size()), per_thread, [&](int64_t i, Thread& t) {
        if (!items_[i].last) local_state(items_[i], t);
      });
      scan_segments();
    }
    for_each_item(static_cast<int64_t>(items_.size()), per_thread, [&](int64_t i, Thread& t) {
      if (params_.causal) {
        causal(items_[i], t);
      } else if (params_.log_decay.data == nullptr) {
        without_decay(items_[i], t);
      } else {
        both_directions(items_[i], t);
      }
    });
  }

 private:
  struct Thread {
    explicit Thread(const LinearSweep& sweep) : engine(&sweep.engine_) {
      using Weights = DecayWeights<T>;
      ScratchPlan plan;
      const size_t state_at = plan.add<char>(engine->state_bytes(sweep.shape_));
      const size_t packed_at = plan.add<char>(engine->packed_bytes(sweep.shape_));
      const size_t acc_at = plan.add<T>(kLinearChunk * engine->acc_stride(sweep.shape_));
      const size_t values_at = plan.add<T>(Weights::kValues);
      const size_t sums_at = plan.add<double>(Weights::kSums);
      char* memory = static_cast<char*>(thread_scratch(plan.bytes()));
      state = memory + state_at;
      packed = memory + packed_at;
      acc = reinterpret_cast<T*>(memory + acc_at);
      weights = std::make_unique<Weights>(*engine, reinterpret_cast<T*>(memory + values_at),
                                          reinterpret_cast<double*>(memory + sums_at));
      engine->begin_thread();
    }
    Thread(const Thread&) = delete;
    Thread& operator=(const Thread&) = delete;
    ~Thread() { engine->end_thread(); }

    FlushSubnormals flush;
    const LinearEngine<T>* engine;
    void* state;
    void* packed;
    T* acc;  // [kLinearChunk][acc_stride]
    std::unique_ptr<DecayWeights<T>> weights;

    // Rows of a backward sweep, aligned like acc.
    T* keep(int64_t count) {
      constexpr size_t kAlignment = 64;
      kept.resize(static_cast<size_t>(count) + kAlignment / sizeof(T));
      void* data = kept.data();
      size_t space = kept.size() * sizeof(T);
      return static_cast<T*>(
          std::align(kAlignment, static_cast<size_t>(count) * sizeof(T), data, space));
    }
    std::vector<T> kept;
  };

  char* out_at(int64_t batch, int64_t head, int64_t row) const {
    return const_cast<char*>(row_at(params_.out, out_size_, batch, head, row));
  }
  T* state_at(const void* states, int64_t index) const {
    return static_cast<T*>(const_cast<void*>(states)) + index * state_size_;
  }
  const T* initial_state(const LinearItem& item) const {
    if (item.segment_state >= 0) return segment_states_.get() + item.segment_state * state_size_;
    if (params_.initial_state == nullptr) return nullptr;
    return state_at(params_.initial_state, item.sequence * params_.num_q_heads + item.head);
  }
  bool wants_rows() const { return params_.out.data != nullptr; }

  // What no sequence owns is zero: rows of out that cu_seqlens leaves out, and chunks at the tail.
  void fill_unowned() {
    if (params_.seqs.cu_seqlens_q == nullptr) return;
    if (params_.chunk_states != nullptr) {
      std::memset(params_.chunk_states, 0,
                  params_.num_q_heads * params_.num_chunks * state_size_ * sizeof(T));
    }
    if (!wants_rows()) return;
    const int32_t* offsets = params_.seqs.cu_seqlens_q;
    const int64_t num_seqs = params_.seqs.num_seqs;
    bool partition = offsets[0] == 0 && offsets[num_seqs] == params_.seqs.seqlen_q;
    for (int64_t s = 0; s < num_seqs; ++s) partition &= offsets[s] <= offsets[s + 1];
    for (int64_t head = 0; !partition && head < params_.num_q_heads; ++head) {
      for (int64_t row = 0; row < params_.seqs.seqlen_q; ++row) {
        std::memset(out_at(0, head, row), 0, params_.head_dim_v * out_size_);
      }
    }
  }

  void make_items() {
    int64_t num_states = 0;
    items_ = linear_items(params_, num_states);
    if (num_states > 0) segment_states_.reset(new T[num_states * state_size_]);
  }

  void begin(const LinearItem& item, Thread& t) const {
    t.weights->begin(params_, item.seq.batch_index, item.head, params_.causal);
  }
  LinearOutput<T> output_at(const LinearItem& item, int64_t step, const T* more) const {
    const int64_t first = chunk_of(params_, item, step) * kLinearChunk;
    int64_t row = first, stride = params_.out.seq_stride;
    if (params_.reverse) {
      row = std::min<int64_t>(first + kLinearChunk, item.seq.q_len) - 1;
      stride = -stride;
    }
    return {out_at(item.seq.batch_index, item.head, item.seq.q_begin + row),
            stride,
            more,
            static_cast<T>(params_.scale),
            static_cast<T>(params_.eps),
            out_bytes() >= kStreamedBytes};
  }
  // out has no gaps.
  int64_t out_bytes() const {
    return params_.seqs.batch * params_.num_q_heads * params_.seqs.seqlen_q * params_.head_dim_v *
           out_size_;
  }

  void attend(const LinearChunk& rows, const ChunkWeights<T>& weights, Thread& t,
              const LinearOutput<T>& output, T* acc) const {
    const bool wide = params_.wide_out && out_size_ != element_size(params_.dtype);
    const bool here = wide && output.out != nullptr;
    engine_.attend(shape_, rows, t.packed, weights, t.state, here ? LinearOutput<T>{} : output,
                   acc);
    if (here) write_wide(acc, rows.num_rows, output);
  }

  // Engines write outputs in the dtype of their inputs.
  void write_wide(const T* acc, int64_t num_rows, const LinearOutput<T>& output) const {
    const int64_t stride = engine_.acc_stride(shape_), columns = params_.head_dim_v;
    for (int64_t i = 0; i < num_rows; ++i, acc += stride) {
      T* out = static_cast<T*>(output.out) + i * output.out_stride;
      const T* more = output.more != nullptr ? output.more + i * stride : nullptr;
      T scale = output.scale;
      if (params_.normalize) {
        scale /= acc[columns] + (more != nullptr ? more[columns] : T(0)) + output.eps;
      }
      if (more != nullptr) {
        for (int64_t c = 0; c < columns; ++c) out[c] = (acc[c] + more[c]) * scale;
      } else {
        for (int64_t c = 0; c < columns; ++c) out[c] = acc[c] * scale;
      }
    }
  }

  void write_final_state(const LinearItem& item, const Thread& t) const {
    if (!item.last || params_.final_state == nullptr) return;
    engine_.store_state(
        shape_, t.state,
        state_at(params_.final_state, item.sequence * params_.num_q_heads + item.head));
  }

  void causal(const LinearItem& item, Thread& t) const {
    begin(item, t);
    const T* initial = initial_state(item);
    engine_.load_state(shape_, initial, t.state);
    bool zero = initial == nullptr;
    for (int64_t step = item.first_step; step < item.last_step; ++step) {
      LinearChunk rows = chunk_at(params_, item, step, wants_rows(), true), next;
      if (step + 1 < item.last_step) {
        next = chunk_at(params_, item, step + 1, wants_rows(), true);
        rows.next = &next;
      }
      engine_.pack(shape_, rows, t.packed);
      ChunkWeights<T> weights = t.weights->forward(token_at(params_, item, step), rows.num_keys);
      if (wants_rows()) {
        if (zero) weights.rows = nullptr;
        attend(rows, weights, t, output_at(item, step, nullptr), t.acc);
      }
      if (step + 1 == item.last_step && !item.last) break;  // the next segment has it already
      engine_.update(shape_, rows, t.packed, weights, t.state);
      zero = false;
      write_chunk_state(item, step, t);
    }
    write_final_state(item, t);
  }

  void write_chunk_state(const LinearItem& item, int64_t step, const Thread& t) const {
    const int64_t row = item.chunk_row + chunk_of(params_, item, step);
    if (params_.chunk_states == nullptr || row >= params_.num_chunks) return;
    const int64_t head = item.seq.batch_index * params_.num_q_heads + item.head;
    engine_.store_state(shape_, t.state,
                        state_at(params_.chunk_states, head * params_.num_chunks + row));
  }

  // The state of a segment's own keys, where the next segment starts until scan_segments.
  void local_state(const LinearItem& item, Thread& t) const {
    begin(item, t);
    engine_.load_state(shape_, nullptr, t.state);
    for (int64_t step = item.first_step; step < item.last_step; ++step) add_keys(item, step, t);
    engine_.store_state(shape_, t.state,
                        segment_states_.get() + (item.segment_state + 1) * state_size_);
  }

  void add_keys(const LinearItem& item, int64_t step, Thread& t) const {
    const LinearChunk keys = chunk_at(params_, item, step, false, true);
    engine_.pack(shape_, keys, t.packed);
    engine_.update(shape_, keys, t.packed,
                   t.weights->forward(token_at(params_, item, step), keys.num_keys), t.state);
  }

  void scan_segments() {
    const auto per_thread = [&] { return Thread(*this); };
    for_each_item(static_cast<int64_t>(items_.size()), per_thread, [&](int64_t first, Thread& t) {
      if (items_[first].first_step != 0 || items_[first].segment_state < 0) return;
      begin(items_[first], t);
      T* state = segment_states_.get() + items_[first].segment_state * state_size_;
      const LinearItem whole{{}, items_[first].sequence, items_[first].head, 0, 0, -1, 0, true};
      const T* initial = initial_state(whole);
      for (int64_t i = 0; i < state_size_; ++i) state[i] = initial != nullptr ? initial[i] : T(0);
      for (int64_t index = first; !items_[index].last; ++index, state += state_size_) {
        const LinearItem& item = items_[index];
        const int64_t ends[] = {chunk_of(params_, item, item.first_step),
                                chunk_of(params_, item, item.last_step - 1)};
        const int64_t begin = std::min(ends[0], ends[1]) * kLinearChunk;
        const int64_t end =
            std::min<int64_t>((std::max(ends[0], ends[1]) + 1) * kLinearChunk, item.seq.k_len);
        const T carry = static_cast<T>(
            std::exp(t.weights->total(item.seq.k_begin + begin, item.seq.k_begin + end)));
        T* next = state + state_size_;
        for (int64_t i = 0; carry != 0 && i < state_size_; ++i) next[i] += carry * state[i];
      }
    });
  }

  void without_decay(const LinearItem& item, Thread& t) const {
    begin(item, t);
    engine_.load_state(shape_, initial_state(item), t.state);
    for (int64_t step = 0; step < item.last_step; ++step) add_keys(item, step, t);
    write_final_state(item, t);
    const int64_t num_chunks = ceil_div(item.seq.q_len, kLinearChunk);
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      attend_state(item, chunk, t.weights->beyond(0), t, output_at(item, chunk, nullptr), t.acc);
    }
  }

  void attend_state(const LinearItem& item, int64_t chunk, const ChunkWeights<T>& weights,
                    Thread& t, const LinearOutput<T>& output, T* acc) const {
    const LinearChunk rows = chunk_at(params_, item, chunk, true, false);
    engine_.pack(shape_, rows, t.packed);
    attend(rows, weights, t, output, acc);
  }

  void both_directions(const LinearItem& item, Thread& t) const {
    begin(item, t);
    const int64_t row_chunks = ceil_div(item.seq.q_len, kLinearChunk);
    const int64_t key_chunks = item.last_step;
    const int64_t kept_size = kLinearChunk * engine_.acc_stride(shape_);
    T* kept = t.keep(row_chunks * kept_size);
    engine_.load_state(shape_, nullptr, t.state);
    for (int64_t chunk = std::max(row_chunks, key_chunks) - 1; chunk >= 0; --chunk) {
      const LinearChunk keys = chunk_at(params_, item, chunk, false, true);
      const ChunkWeights<T> weights =
          t.weights->backward(token_at(params_, item, chunk), keys.num_keys);
      if (chunk < row_chunks) {
        attend_state(item, chunk, weights, t, {}, kept + chunk * kept_size);
      }
      if (keys.num_keys == 0) continue;
      engine_.pack(shape_, keys, t.packed);
      engine_.update(shape_, keys, t.packed, weights, t.state);
    }
    engine_.load_state(shape_, initial_state(item), t.state);
    for (int64_t chunk = 0; chunk < key_chunks; ++chunk) {
      const LinearChunk rows = chunk_at(params_, item, chunk, true, true);
      engine_.pack(shape_, rows, t.packed);
      const ChunkWeights<T> weights =
          t.weights->forward(token_at(params_, item, chunk), rows.num_keys);
      if (rows.num_rows > 0) {
        attend(rows, weights, t, output_at(item, chunk, kept + chunk * kept_size), t.acc);
      }
      engine_.update(shape_, rows, t.packed, weights, t.state);
    }
    write_final_state(item, t);
    for (int64_t chunk = key_chunks; chunk < row_chunks; ++chunk) {
      const int64_t distance = chunk * kLinearChunk + 1 - item.seq.k_len;
      attend_state(item, chunk, t.weights->beyond(distance), t, output_at(item, chunk, nullptr),
                   t.acc);
    }
  }

  const LinearAttentionParams& params_;
  const LinearEngine<T>& engine_;
  const LinearShape shape_;
  const int64_t state_size_;
  const int64_t out_size_;  // bytes of an element of out
  std::vector<LinearItem> items_;
  std::unique_ptr<T[]> segment_states_;  // [segments][head_dim][state_dim]
};

}  // namespace

void run_linear_attention_cpu(const LinearAttentionParams& params) {
  if (params.dtype == DType::kFloat64) return LinearSweep<double>(params).run();
  LinearSweep<float>(params).run();
}

}  // namespace longctx::cpu
