// Launches linear_attention and linear_attention_states: which passes, and how they are cut.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>

#include "cuda/kernels.h"
#include "cuda/linear_attention.h"
#include "cuda/linear_attention_fp32.h"
#include "cuda/linear_states.cuh"
#include "cuda/runtime.h"
#include "cuda/supported.h"
#include "cuda/unowned_rows.h"

namespace longctx::cuda {
namespace {

constexpr int64_t kMinSegmentChunks = 16;  // below, the states of segments cost more than they save

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

class LinearAttention {
 public:
  explicit LinearAttention(const LinearAttentionParams& params)
      : p_(params),
        op_(params.chunk_states != nullptr ? "linear_attention_states" : "linear_attention"),
        maps_(params.seqs.num_seqs * params.num_q_heads),
        state_size_(params.head_dim * params.state_dim()) {}

  void run() const {
    require_supported(op_, p_.dtype, p_.head_dim, p_.seqs, p_.q.data == nullptr ? "k" : "q");
    if (p_.head_dim_v > kMaxHeadDim) {
      throw std::invalid_argument(std::string("longctx::") + op_ +
                                  ": `v` must have a head_dim_v of at most 256 on CUDA; got " +
                                  std::to_string(p_.head_dim_v));
    }
    fill_unowned();
    if (p_.causal) {
      LinearPass pass = new_pass();
      pass.keys = true;
      pass.descending = p_.reverse;
      pass.pairs = p_.reverse ? LinearPairs::kFromRow : LinearPairs::kUpToRow;
      pass.chunk_states = static_cast<float*>(p_.chunk_states);
      write_to_out(pass);
      sweep(pass, initial_state(), static_cast<float*>(p_.final_state));
    } else if (p_.log_decay.data == nullptr) {
      without_decay();
    } else {
      both_directions();
    }
  }

 private:
  const float* initial_state() const { return static_cast<const float*>(p_.initial_state); }

  LinearPass new_pass() const {
    LinearPass pass;
    pass.op = op_;
    pass.slice_columns = p_.dtype == DType::kFloat32
                             ? linear_fp32_slice_columns(p_.head_dim)
                             : linear_slice_columns(p_.head_dim, p_.head_dim_v);
    pass.num_slices = ceil_div(p_.head_dim_v, pass.slice_columns);
    return pass;
  }

  void write_to_out(LinearPass& pass) const {
    pass.rows = p_.out.data != nullptr;
    pass.out = p_.out;
    pass.wide_out = p_.wide_out || p_.dtype == DType::kFloat32;
  }

  // 0: as many as there are places for blocks on the device; the lengths of sequences are there as
  // well, the axes bound them.
  int64_t choose_segments(const LinearPass& pass) const {
    int64_t wanted = p_.num_segments;
    const int64_t length = pass.keys && !pass.beyond_keys ? p_.seqs.seqlen_k
                           : pass.keys ? std::max(p_.seqs.seqlen_q, p_.seqs.seqlen_k)
                                       : p_.seqs.seqlen_q;
    const int64_t chunks = linear_chunks(length);
    if (wanted == 0) {
      const int64_t places = int64_t{2} * device_limits().num_multiprocessors;
      wanted = std::min(places / std::max<int64_t>(maps_ * pass.num_slices, 1),
                        chunks / kMinSegmentChunks);
    }
    return std::max<int64_t>(std::min(wanted, chunks), 1);
  }

  // One pass over the tokens. With segments, another one before it finds out where they start.
  void sweep(LinearPass pass, const float* initial, float* final_state) const {
    pass.num_segments = pass.num_walked = choose_segments(pass);
    pass.starts = initial;
    pass.final_state = final_state;
    if (pass.num_segments == 1) return launch_pass(pass);
    const Workspace states(maps_ * pass.num_segments * state_size_ * sizeof_float());
    const Workspace carries(maps_ * pass.num_segments * sizeof_float());
    LinearPass local = local_pass(pass, states, carries);
    --local.num_walked;  // the last one ends in the final state
    launch_pass(local);
    scan(local, initial, local.local_states, nullptr);
    pass.starts = local.local_states;
    pass.start_stride = pass.num_segments;
    launch_pass(pass);
  }

  // What the keys of each segment add.
  static LinearPass local_pass(const LinearPass& pass, const Workspace& states,
                               const Workspace& carries) {
    LinearPass local = pass;
    local.rows = false;
    local.pairs = LinearPairs::kNone;
    local.out = {};
    local.starts = nullptr;
    local.final_state = local.chunk_states = nullptr;
    local.local_states = states.as<float>();
    local.carries = carries.as<float>();
    return local;
  }

  void scan(const LinearPass& local, const float* initial, float* starts,
            float* final_state) const {
    LinearScan params;
    params.state_size = state_size_;
    params.blocks_per_map = ceil_div(state_size_, kScanThreads);
    params.num_segments = local.num_segments;
    params.initial_state = initial;
    params.local_states = local.local_states;
    params.carries = local.carries;
    params.starts = starts;
    params.final_state = final_state;
    launch_blocks(&scan_linear_states_kernel, maps_ * params.blocks_per_map, params);
  }

  // All rows see the one state of all keys.
  void without_decay() const {
    std::optional<Workspace> own;
    float* state = static_cast<float*>(p_.final_state);
    if (state == nullptr) {
      own.emplace(maps_ * state_size_ * sizeof_float());
      state = own->as<float>();
    }
    LinearPass keys = new_pass();
    keys.keys = true;
    keys.num_segments = keys.num_walked = choose_segments(keys);
    if (keys.num_segments == 1) {
      keys.starts = initial_state();
      keys.final_state = state;
      launch_pass(keys);
    } else {
      const Workspace states(maps_ * keys.num_segments * state_size_ * sizeof_float());
      const Workspace carries(maps_ * keys.num_segments * sizeof_float());
      const LinearPass local = local_pass(keys, states, carries);
      launch_pass(local);
      scan(local, initial_state(), nullptr, state);
    }
    LinearPass rows = new_pass();
    write_to_out(rows);
    rows.num_segments = rows.num_walked = choose_segments(rows);
    rows.starts = state;
    launch_pass(rows);
  }

  // What rows see of later chunks comes first and is kept until the sweep forwards adds it.
  void both_directions() const {
    const int64_t rows = p_.seqs.batch * p_.num_q_heads * p_.seqs.seqlen_q;
    const Workspace kept(rows * p_.head_dim_v * sizeof_float());
    const Workspace kept_sums(p_.normalize ? rows * sizeof_float() : 0);
    LinearPass pass = new_pass();
    pass.keys = pass.beyond_keys = true;
    LinearPass backward = pass;
    backward.descending = true;
    backward.rows = backward.wide_out = backward.raw_out = true;
    backward.out = {kept.as<float>(), p_.num_q_heads * p_.seqs.seqlen_q * p_.head_dim_v,
                    p_.seqs.seqlen_q * p_.head_dim_v, p_.head_dim_v};
    backward.sums = kept_sums.as<float>();
    sweep(backward, nullptr, nullptr);
    pass.pairs = LinearPairs::kAll;
    write_to_out(pass);
    pass.more = kept.as<float>();
    pass.more_sums = kept_sums.as<float>();
    sweep(pass, initial_state(), static_cast<float*>(p_.final_state));
  }

  // What no sequence owns is zero: rows that cu_seqlens leaves out, and chunks at the tail.
  void fill_unowned() const {
    if (p_.seqs.cu_seqlens_q == nullptr) return;
    if (p_.chunk_states != nullptr) {
      launch_blocks(&fill_unowned_chunks_kernel, p_.num_q_heads * p_.num_chunks, p_);
    }
    if (p_.out.data == nullptr) return;
    const int64_t element = p_.wide_out || p_.dtype == DType::kFloat32 ? 4 : 2;
    UnownedRows rows;
    rows.seqs = p_.seqs;
    rows.num_maps = p_.num_q_heads;
    rows.out = static_cast<char*>(p_.out.data);
    rows.map_stride = p_.out.head_stride * element;
    rows.row_stride = p_.out.seq_stride * element;
    rows.row_bytes = p_.head_dim_v * element;
    fill_unowned_rows(op_, rows);
  }

  template <class Params>
  void launch_blocks(void (*kernel)(Params), int64_t blocks, const Params& params) const {
    if (blocks == 0) return;
    launch(op_, kernel, dim3(static_cast<unsigned>(blocks)), kScanThreads, 0, params);
  }

  void launch_pass(const LinearPass& pass) const {
    if (num_items(p_, pass) == 0) return;
    const auto run = [&](auto type) {
      using T = decltype(type);
      if (p_.head_dim <= 64) return launch_linear_attention<T, 64>(p_, pass);
      if (p_.head_dim <= 128) return launch_linear_attention<T, 128>(p_, pass);
      launch_linear_attention<T, 256>(p_, pass);
    };
    if (p_.dtype == DType::kBFloat16) return run(__nv_bfloat16());
    if (p_.dtype == DType::kFloat16) return run(__half());
    if (p_.head_dim <= 64) return launch_linear_attention_fp32<float, 64>(p_, pass);
    if (p_.head_dim <= 128) return launch_linear_attention_fp32<float, 128>(p_, pass);
    launch_linear_attention_fp32<float, 256>(p_, pass);
  }

  static constexpr int64_t sizeof_float() { return static_cast<int64_t>(sizeof(float)); }

  const LinearAttentionParams& p_;
  const char* op_;
  const int64_t maps_;  // (sequence, query head)
  const int64_t state_size_;
};

}  // namespace

void run_linear_attention_cuda(const LinearAttentionParams& params) {
  LinearAttention(params).run();
}

}  // namespace longctx::cuda
