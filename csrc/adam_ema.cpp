// gdd_fast_C::adam_ema_: checks and dispatch. The definition is adam_ema_ref_ in gdd_fast/ops/adam_ema.py.
#include "adam_ema.h"

#include <ATen/ops/zeros.h>

#include "ops.h"

namespace gdd_fast {
namespace {

void check_like(const char* name, at::TensorList tensors, at::TensorList params, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(tensors.size() == params.size(), "adam_ema_: ", tensors.size(), " ", name, " for ", params.size(),
                    " parameters");
  for (size_t k = 0; k < params.size(); k++) {
    const at::Tensor &t = tensors[k], &p = params[k];
    TORCH_CHECK_VALUE(t.scalar_type() == dtype && t.device() == p.device() && t.sizes() == p.sizes() &&
                          t.strides() == p.strides() && t.is_non_overlapping_and_dense(),
                      "adam_ema_: ", name, "[", k, "] must be ", dtype, ", dense, and in memory like its parameter");
  }
}

}  // namespace

void adam_ema_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
               at::TensorList averages, at::TensorList copies, at::Tensor step, at::Tensor skipped,
               const at::Tensor& lr, const at::Tensor& average_weight, double beta1, double beta2, double eps,
               double weight_decay) {
  check_like("params", params, params, at::kFloat);
  check_like("grads", grads, params, at::kFloat);
  check_like("exp_avgs", exp_avgs, params, at::kFloat);
  check_like("exp_avg_sqs", exp_avg_sqs, params, at::kFloat);
  if (!averages.empty()) check_like("averages", averages, params, at::kFloat);
  if (!copies.empty()) {
    const auto dtype = copies[0].scalar_type();
    TORCH_CHECK_VALUE(dtype == at::kBFloat16 || dtype == at::kHalf, "adam_ema_: copies are bfloat16 or float16, not ",
                      dtype);
    check_like("copies", copies, params, dtype);
  }
  TORCH_CHECK_VALUE(step.scalar_type() == at::kFloat && skipped.scalar_type() == at::kLong &&
                        lr.scalar_type() == at::kDouble && average_weight.scalar_type() == at::kDouble &&
                        step.numel() == 1 && skipped.numel() == 1 && lr.numel() == 1 && average_weight.numel() == 1,
                    "adam_ema_: step must be float32, skipped int64, lr and average_weight float64, each one number");
  if (params.empty()) return;
  const AdamOptions options{beta1, beta2, eps, weight_decay};
#ifdef GDD_FAST_WITH_CUDA
  if (params[0].is_cuda()) {
    at::Tensor found = at::zeros({1}, params[0].options().dtype(at::kInt));
    cuda::adam_ema_(params, grads, exp_avgs, exp_avg_sqs, averages, copies, step, skipped, lr, average_weight, found,
                    options);
    return;
  }
#endif
  cpu::adam_ema_(params, grads, exp_avgs, exp_avg_sqs, averages, copies, step, skipped, lr, average_weight, options);
}

}  // namespace gdd_fast
