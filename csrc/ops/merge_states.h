// merge_states: attention over disjoint key sets -> attention over their union.
#pragma once
#include "checks.h"

namespace longctx {

template <void (*run)(const MergeStatesParams&)>
std::tuple<Tensor, Tensor> merge_states(const Tensor& out, const Tensor& lse,
                                        const OptionalTensor& lse_override) {
  const Checker check("merge_states");
  MergeStatesParams params;
  params.dtype = check.floating("out", out);
  const ScalarType lse_type =
      params.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  check.shape("out", out, "[num_states, batch, heads, seqlen, dim]",
              {kAnySize, kAnySize, kAnySize, kAnySize, kAnySize});
  check.require(out.size(0) > 0, "out", "hold at least one state", out.sizes());
  const auto check_lse = [&](const char* name, const Tensor& tensor) {
    check.same_device(name, tensor, out);
    check.dtype(name, tensor, lse_type);
    check.shape(name, tensor, "[num_states, batch, heads, seqlen]",
                {out.size(0), out.size(1), out.size(2), out.size(3)});
  };
  check_lse("lse", lse);
  if (lse_override) check_lse("lse_override", *lse_override);

  const Tensor states = torch::stable::contiguous(out);
  const Tensor states_lse = torch::stable::contiguous(lse);
  const Tensor weights = torch::stable::contiguous(lse_override.value_or(lse));
  const Tensor merged_out = new_tensor(out, {out.size(1), out.size(2), out.size(3), out.size(4)});
  const Tensor merged_lse = new_tensor(lse, {out.size(1), out.size(2), out.size(3)});

  params.num_states = out.size(0);
  params.rows = out.size(1) * out.size(2) * out.size(3);
  params.dim = out.size(4);
  params.out = states.const_data_ptr();
  params.lse = states_lse.const_data_ptr();
  params.lse_override = lse_override ? weights.const_data_ptr() : nullptr;
  params.merged_out = merged_out.mutable_data_ptr();
  params.merged_lse = merged_lse.mutable_data_ptr();
  run(params);
  return {merged_out, merged_lse};
}

}  // namespace longctx
