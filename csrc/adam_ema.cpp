// gdd_fast_C::adam_ema_: checks and dispatch. The definition is adam_ema_ref_ in gdd_fast/ops/adam_ema.py.
#include <vector>

#include "adam_ema_launchers.h"

namespace gdd_fast {
namespace {

// The stride of a dimension of size 1 does not matter.
bool same_memory(const at::Tensor& t, const at::Tensor& p) {
  for (int64_t d = 0; d < p.dim(); d++) {
    if (p.size(d) > 1 && t.stride(d) != p.stride(d)) return false;
  }
  return true;
}

void check_like(const char* name, at::TensorList tensors, at::TensorList params) {
  TORCH_CHECK_VALUE(tensors.size() == params.size(), "adam_ema_: ", tensors.size(), " ", name, " for ", params.size(),
                    " parameters");
  for (size_t k = 0; k < params.size(); k++) {
    const at::Tensor &t = tensors[k], &p = params[k];
    TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat && t.device() == p.device() && t.sizes() == p.sizes() &&
                          same_memory(t, p) && t.is_non_overlapping_and_dense(),
                      "adam_ema_: ", name, "[", k, "] must be float32, dense, and in memory like its parameter");
  }
}

}  // namespace

void adam_ema_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
               at::TensorList averages, at::Tensor step, at::Tensor skipped, const at::Tensor& lr,
               const at::Tensor& average_weight, at::IntArrayRef sizes, at::ArrayRef<double> beta1,
               at::ArrayRef<double> beta2, at::ArrayRef<double> eps, at::ArrayRef<double> weight_decay) {
  check_like("params", params, params);
  check_like("grads", grads, params);
  check_like("exp_avgs", exp_avgs, params);
  check_like("exp_avg_sqs", exp_avg_sqs, params);
  if (!averages.empty()) check_like("averages", averages, params);
  TORCH_CHECK_VALUE(step.scalar_type() == at::kFloat && skipped.scalar_type() == at::kLong &&
                        average_weight.scalar_type() == at::kDouble && step.numel() == 1 && skipped.numel() == 1 &&
                        average_weight.numel() == 1,
                    "adam_ema_: step must be float32, skipped int64 and average_weight float64, each one number");
  TORCH_CHECK_VALUE(
      lr.scalar_type() == at::kDouble && lr.is_contiguous() && lr.numel() == static_cast<int64_t>(sizes.size()),
      "adam_ema_: lr must hold one float64 number for each of ", sizes.size(), " groups");
  TORCH_CHECK_VALUE(beta1.size() == sizes.size() && beta2.size() == sizes.size() && eps.size() == sizes.size() &&
                        weight_decay.size() == sizes.size(),
                    "adam_ema_: every group needs its options");
  std::vector<AdamGroup> groups;
  int64_t tensors = 0;
  for (size_t g = 0; g < sizes.size(); g++) {
    groups.push_back({sizes[g], beta1[g], beta2[g], eps[g], weight_decay[g]});
    TORCH_CHECK_VALUE(sizes[g] >= 0, "adam_ema_: a group of ", sizes[g], " parameters");
    tensors += sizes[g];
  }
  TORCH_CHECK_VALUE(tensors == static_cast<int64_t>(params.size()), "adam_ema_: groups of ", tensors,
                    " parameters in all, and there are ", params.size());
  if (params.empty()) return;
  GDD_FAST_LAUNCH(params[0],
                  adam_ema_(params, grads, exp_avgs, exp_avg_sqs, averages, step, skipped, lr, average_weight, groups));
}

}  // namespace gdd_fast

GDD_FAST_OPERATOR(adam_ema_,
                  "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
                  "Tensor(d!)[] averages, Tensor(e!) step, Tensor(f!) skipped, Tensor lr, Tensor average_weight, "
                  "int[] sizes, float[] beta1, float[] beta2, float[] eps, float[] weight_decay) -> ()")
