// The arguments that attention, block_sparse_attention and attention_mass share, checked once.
#pragma once
#include <algorithm>

#include "checks.h"

namespace longctx {

struct AttentionOptions {
  bool causal;
  std::optional<double> softmax_scale;
  int64_t window_size_left;
  int64_t window_size_right;
  int64_t num_sink_tokens;
  double softcap;
  const OptionalTensor& key_ranges;
  const OptionalTensor& cu_seqlens_q;
  const OptionalTensor& cu_seqlens_k;
  const OptionalTensor& seqused_k;
};

inline const int32_t* data_or_null(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<int32_t>() : nullptr;
}

inline TensorView view_of(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1),
          tensor.stride(2)};
}

inline const float* sinks_data(const Checker& check, const OptionalTensor& sinks, const Tensor& q) {
  if (!sinks) return nullptr;
  check.same_device("sinks", *sinks, q);
  check.dtype("sinks", *sinks, ScalarType::Float);
  check.shape("sinks", *sinks, "[num_q_heads]", {q.size(1)});
  check.contiguous("sinks", *sinks);
  return sinks->const_data_ptr<float>();
}

// q [batch, num_q_heads, seqlen_q, head_dim] and k [batch, num_kv_heads, seqlen_k, head_dim], or,
// in pages, [num_pages, num_kv_heads, page_size, head_dim].
template <class Params>
void fill_query_key(const Checker& check, const Tensor& q, const Tensor& k, Params& params,
                    bool in_pages = false) {
  params.dtype = check.floating("q", q);
  check.shape("q", q, "[batch, num_q_heads, seqlen_q, head_dim]",
              {kAnySize, kAnySize, kAnySize, kAnySize});
  check.require(q.size(1) > 0, "q", "have at least one head", q.sizes());
  check.require(q.size(3) > 0, "q", "have a head_dim of at least 1", q.sizes());
  check.contiguous_last_dim("q", q);
  check.same_device("k", k, q);
  check.dtype("k", k, q.scalar_type());
  check.shape("k", k,
              in_pages ? "[num_pages, num_kv_heads, page_size, head_dim]"
                       : "[batch, num_kv_heads, seqlen_k, head_dim]",
              {in_pages ? kAnySize : q.size(0), kAnySize, kAnySize, q.size(3)});
  check.require(k.size(1) > 0 && q.size(1) % k.size(1) == 0, "k",
                "have a number of heads that divides the number of heads of `q`",
                Beside{k.size(1), q.size(1)});
  check.contiguous_last_dim("k", k);
  params.q = view_of(q);
  params.k = view_of(k);
  params.num_q_heads = q.size(1);
  params.num_kv_heads = k.size(1);
  params.head_dim = q.size(3);
}

// `first` is the tensor whose batch the sequences share; the caller sets the lengths of the axes.
inline SequenceParams sequences(const Checker& check, const char* name, const Tensor& first,
                                const OptionalTensor& cu_seqlens_q,
                                const OptionalTensor& cu_seqlens_k,
                                const OptionalTensor& seqused_k) {
  SequenceParams seqs;
  seqs.batch = seqs.num_seqs = first.size(0);
  const auto check_lengths = [&](const char* name, const Tensor& tensor, const char* shape,
                                 int64_t size) {
    check.same_device(name, tensor, first);
    check.dtype(name, tensor, ScalarType::Int);
    check.shape(name, tensor, shape, {size});
    check.contiguous(name, tensor);
  };
  if (cu_seqlens_q || cu_seqlens_k) {
    check.require(cu_seqlens_q.has_value(), "cu_seqlens_q", "be given with `cu_seqlens_k`", "None");
    check.require(cu_seqlens_k.has_value(), "cu_seqlens_k", "be given with `cu_seqlens_q`", "None");
    check.require(first.size(0) == 1, name, "have batch 1 when sequences are packed",
                  first.sizes());
    check_lengths("cu_seqlens_q", *cu_seqlens_q, "[num_seqs + 1]", kAnySize);
    check.require(cu_seqlens_q->size(0) > 0, "cu_seqlens_q", "hold at least one offset", "none");
    check_lengths("cu_seqlens_k", *cu_seqlens_k, "[num_seqs + 1]", cu_seqlens_q->size(0));
    seqs.num_seqs = cu_seqlens_q->size(0) - 1;
  }
  if (seqused_k) {
    check.require(!cu_seqlens_q, "seqused_k", "not be combined with packed sequences", "both");
    check_lengths("seqused_k", *seqused_k, "[batch]", first.size(0));
  }
  seqs.cu_seqlens_q = data_or_null(cu_seqlens_q);
  seqs.cu_seqlens_k = data_or_null(cu_seqlens_k);
  seqs.seqused_k = data_or_null(seqused_k);
  return seqs;
}

// q and k share their offsets.
inline SequenceParams sequences(const Checker& check, const char* name, const Tensor& first,
                                const OptionalTensor& cu_seqlens) {
  SequenceParams seqs;
  seqs.batch = seqs.num_seqs = first.size(0);
  if (!cu_seqlens) return seqs;
  check.require(first.size(0) == 1, name, "have batch 1 when sequences are packed", first.sizes());
  check.same_device("cu_seqlens", *cu_seqlens, first);
  check.dtype("cu_seqlens", *cu_seqlens, ScalarType::Int);
  check.shape("cu_seqlens", *cu_seqlens, "[num_seqs + 1]", {kAnySize});
  check.require(cu_seqlens->size(0) > 0, "cu_seqlens", "hold at least one offset", "none");
  check.contiguous("cu_seqlens", *cu_seqlens);
  seqs.num_seqs = cu_seqlens->size(0) - 1;
  seqs.cu_seqlens_q = seqs.cu_seqlens_k = data_or_null(cu_seqlens);
  return seqs;
}

inline SequenceParams sequences(const Checker& check, const Tensor& q, const Tensor& k,
                                const OptionalTensor& cu_seqlens_q,
                                const OptionalTensor& cu_seqlens_k,
                                const OptionalTensor& seqused_k) {
  SequenceParams seqs = sequences(check, "q", q, cu_seqlens_q, cu_seqlens_k, seqused_k);
  seqs.seqlen_q = q.size(2);
  seqs.seqlen_k = k.size(2);
  return seqs;
}

inline MaskParams mask_params(const Checker& check, const Tensor& q, const Tensor& k,
                              const AttentionOptions& options) {
  MaskParams mask;
  mask.causal = options.causal;
  // A window longer than both axes is open; this also keeps positions far from overflow.
  const int64_t longest = q.size(2) + k.size(2);
  const auto window = [&](const char* name, int64_t size) {
    check.require(size >= -1, name, "be a number of keys, or -1 for open", size);
    return size >= longest ? -1 : size;
  };
  mask.window_size_left = window("window_size_left", options.window_size_left);
  mask.window_size_right = window("window_size_right", options.window_size_right);
  check.require(options.num_sink_tokens >= 0, "num_sink_tokens", "not be negative",
                options.num_sink_tokens);
  mask.num_sink_tokens = std::min(options.num_sink_tokens, k.size(2));
  if (options.key_ranges) {
    const Tensor& ranges = *options.key_ranges;
    check.same_device("key_ranges", ranges, q);
    check.dtype("key_ranges", ranges, ScalarType::Int);
    check.shape("key_ranges", ranges, "[batch, R, seqlen_q, 2]",
                {q.size(0), kAnySize, q.size(2), 2});
    check.require(ranges.size(1) == 1 || ranges.size(1) == 2, "key_ranges",
                  "give one or two ranges per row", ranges.size(1));
    check.contiguous_last_dim("key_ranges", ranges);
    mask.key_ranges = ranges.const_data_ptr<int32_t>();
    mask.num_key_ranges = ranges.size(1);
    mask.key_ranges_batch_stride = ranges.stride(0);
    mask.key_ranges_range_stride = ranges.stride(1);
    mask.key_ranges_row_stride = ranges.stride(2);
  }
  return mask;
}

// Everything but v, out and lse. Params is AttentionParams, one derived from it, or
// AttentionMassParams.
template <class Params>
void fill_attention(const Checker& check, const Tensor& q, const Tensor& k,
                    const AttentionOptions& options, Params& params) {
  fill_query_key(check, q, k, params);
  params.seqs =
      sequences(check, q, k, options.cu_seqlens_q, options.cu_seqlens_k, options.seqused_k);
  params.mask = mask_params(check, q, k, options);
  params.softmax_scale =
      options.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(params.head_dim)));
  check.finite("softmax_scale", params.softmax_scale);
  check.finite("softcap", options.softcap);
  check.require(options.softcap >= 0, "softcap", "not be negative (0 means none)", options.softcap);
  params.softcap = options.softcap;
}

}  // namespace longctx
