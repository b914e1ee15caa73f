// Launches adam_ema.cuh for torch tensors, on their device and torch's current stream.
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <vector>

#include "adam_ema_launchers.h"
#include "cuda/adam_ema.cuh"

namespace gdd_fast::cuda {
namespace {

std::vector<Tensors> batches_of(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                                at::TensorList exp_avg_sqs, at::TensorList averages, at::ArrayRef<AdamGroup> groups) {
  std::vector<Tensors> batches;
  size_t k = 0;
  for (size_t group = 0; group < groups.size(); group++) {
    for (const size_t end = k + groups[group].tensors; k < end; k++) {
      const int64_t size = params[k].numel();
      if (size == 0) continue;
      if (batches.empty() || batches.back().count == kTensors || batches.back().group != static_cast<int>(group)) {
        batches.emplace_back().group = static_cast<int>(group);
      }
      Tensors& t = batches.back();
      const int slot = t.count++;
      t.grad[slot] = grads[k].const_data_ptr<float>();
      t.param[slot] = params[k].mutable_data_ptr<float>();
      t.exp_avg[slot] = exp_avgs[k].mutable_data_ptr<float>();
      t.exp_avg_sq[slot] = exp_avg_sqs[k].mutable_data_ptr<float>();
      t.average[slot] = averages.empty() ? nullptr : averages[k].mutable_data_ptr<float>();
      t.size[slot] = size;
      t.first_chunk[slot + 1] = t.first_chunk[slot] + static_cast<uint32_t>((size + kChunk - 1) / kChunk);
    }
  }
  return batches;
}

}  // namespace

void adam_ema_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
               at::TensorList averages, at::Tensor& step, at::Tensor& skipped, const at::Tensor& lr,
               const at::Tensor& average_weight, at::ArrayRef<AdamGroup> groups) {
  const c10::cuda::CUDAGuard guard(params[0].device());
  at::Tensor found = at::zeros({1}, params[0].options().dtype(at::kInt));
  const AdamState state{found.mutable_data_ptr<int>(), step.mutable_data_ptr<float>(),
                        skipped.mutable_data_ptr<int64_t>(), lr.const_data_ptr<double>(),
                        average_weight.const_data_ptr<double>()};
  const auto batches = batches_of(params, grads, exp_avgs, exp_avg_sqs, averages, groups);
  C10_CUDA_CHECK(launch_adam_ema(batches.data(), static_cast<int64_t>(batches.size()), state, groups.data(),
                                 c10::cuda::getCurrentCUDAStream()));
}

}  // namespace gdd_fast::cuda
