// The CPU implementations of this build: the CUDA ones.
#include <ATen/ops/zeros.h>

#include "ops.h"

namespace gdd_fast::cpu {

void to_uint8(const at::Tensor& x, at::Tensor& y) { cuda::to_uint8(x, y); }

bool resample2d_takes(const at::Tensor&) { return true; }

void resample2d(const Resample& r, const at::Tensor& x, const at::Tensor& kernel, const std::optional<at::Tensor>& add,
                at::Tensor& y) {
  cuda::resample2d(r, x, kernel, add, y);
}

void discriminator_input(const DiscriminatorInput& d, const at::Tensor& x, std::vector<at::Tensor>& ys) {
  cuda::discriminator_input(d, x, ys);
}

void discriminator_input_backward(const DiscriminatorInput& d, at::TensorList dys, at::Tensor& dx) {
  cuda::discriminator_input_backward(d, dys, dx);
}

void adam_ema_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
               at::TensorList averages, at::TensorList copies, at::Tensor& step, at::Tensor& skipped,
               const at::Tensor& lr, const at::Tensor& average_weight, at::ArrayRef<AdamGroup> groups) {
  at::Tensor found = at::zeros({1}, params[0].options().dtype(at::kInt));
  cuda::adam_ema_(params, grads, exp_avgs, exp_avg_sqs, averages, copies, step, skipped, lr, average_weight, found,
                  groups);
}

}  // namespace gdd_fast::cpu
