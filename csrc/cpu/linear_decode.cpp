// linear_attention_decode on the CPU. A work item is a (batch entry, head): every token reads and
// writes the state once. Tokens past `commit` work on a copy.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "flush_subnormals.h"
#include "kernels.h"
#include "linear_engine.h"
#include "parallel.h"
#include "scratch.h"

namespace longctx::cpu {
namespace {

template <class T>
struct LinearDecode {
  const LinearAttentionDecodeParams& params;

  struct Thread {
    explicit Thread(const LinearDecode& decode) {
      const auto& p = decode.params;
      const int64_t columns = (p.state_dim() + 15) / 16 * 16;
      ScratchPlan plan;
      const size_t acc_at = plan.add<T>(columns);
      const size_t copy_at = plan.add<T>(p.commit != nullptr ? p.head_dim * p.state_dim() : 0);
      char* memory = static_cast<char*>(thread_scratch(plan.bytes()));
      acc = reinterpret_cast<T*>(memory + acc_at);
      copy = reinterpret_cast<T*>(memory + copy_at);
    }
    FlushSubnormals flush;
    T* acc;   // [state_dim]
    T* copy;  // [head_dim][state_dim]
  };

  char* row_at(const TensorView& view, int64_t batch, int64_t head, int64_t row) const {
    const int64_t size = params.dtype == DType::kFloat64   ? 8
                         : params.dtype == DType::kFloat32 ? 4
                                                           : 2;
    return static_cast<char*>(view.data) +
           (batch * view.batch_stride + head * view.head_stride + row * view.seq_stride) * size;
  }

  void run() const {
    const LinearEngine<T>& engine = choose_linear_engine<T>(params.dtype, active_isa());
    for_each_item(
        params.batch * params.num_q_heads, [&] { return Thread(*this); },
        [&](int64_t item, Thread& t) {
          step(engine, item / params.num_q_heads, item % params.num_q_heads, t);
        });
  }

  void step(const LinearEngine<T>& engine, int64_t batch, int64_t head, Thread& t) const {
    const LinearShape shape{params.head_dim, params.head_dim_v, params.normalize};
    const int64_t kv_head = head / (params.num_q_heads / params.num_kv_heads);
    const int64_t slot = params.state_indices != nullptr ? params.state_indices[batch] : batch;
    const bool present = slot >= 0 && slot < params.num_slots;
    const int64_t kept = params.commit != nullptr ? params.commit[batch] : params.num_tokens;
    T* state = nullptr;
    int64_t stride = params.state.seq_stride;
    if (present) {
      state = static_cast<T*>(params.state.data) + slot * params.state.batch_stride +
              head * params.state.head_stride;
    }
    for (int64_t token = 0; token < params.num_tokens; ++token) {
      void* out = row_at(params.out, batch, head, token);
      if (!present) {
        std::fill_n(t.acc, params.state_dim(), T(0));
        engine.finish(shape, t.acc, 1, {out, 0, nullptr, T(0), T(1)});
        continue;
      }
      if (token == std::max<int64_t>(kept, 0)) {
        const int64_t columns = params.state_dim();
        for (int64_t d = 0; d < params.head_dim; ++d) {
          std::memcpy(t.copy + d * columns, state + d * stride, columns * sizeof(T));
        }
        state = t.copy;
        stride = columns;
      }
      const double log_decay =
          log_decay_at(params.log_decay, batch, params.num_q_heads, head, params.num_tokens, token);
      // state = decay state + k v^T; acc = q^T state
      engine.decode(shape, row_at(params.q, batch, head, token),
                    row_at(params.k, batch, kv_head, token),
                    row_at(params.v, batch, kv_head, token), static_cast<T>(std::exp(log_decay)),
                    state, stride, t.acc);
      // write out
      engine.finish(shape, t.acc, 1,
                    {out, 0, nullptr, static_cast<T>(params.scale), static_cast<T>(params.eps)});
    }
  }
};

}  // namespace

void run_linear_attention_decode_cpu(const LinearAttentionDecodeParams& params) {
  if (params.dtype == DType::kFloat64) return LinearDecode<double>{params}.run();
  LinearDecode<float>{params}.run();
}

}  // namespace longctx::cpu
