// The launchers of adam_ema_; adam_ema.h is what the CUDA kernel sees of them.
#pragma once
#include "adam_ema.h"
#include "devices.h"

namespace gdd_fast {

GDD_FAST_LAUNCHERS(void adam_ema_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                                  at::TensorList exp_avg_sqs, at::TensorList averages, at::Tensor& step,
                                  at::Tensor& skipped, const at::Tensor& lr, const at::Tensor& average_weight,
                                  at::ArrayRef<AdamGroup> groups);)

}  // namespace gdd_fast
