// adam_ema_ on the GPU. Torch-free: raw pointers, sizes and a stream, so that nvcc alone can compile it.
//
// Three kernels: look for numbers that are not finite, count the step or the skip, update. Each runs over chunks of
// many tensors, whose pointers travel in the launch's arguments; nothing waits for the host, so a CUDA graph can hold
// it.
#pragma once
#include <cmath>
#include <cstdint>

#include "adam_ema.h"
#include "cuda/floats.cuh"

namespace gdd_fast::cuda {

constexpr int kTensors = 48;       // a launch; their pointers have to fit the 4 KiB of a kernel's arguments
constexpr int64_t kChunk = 16384;  // numbers a block
constexpr int kThreads = 256;

// Up to kTensors tensors in chunks: those of tensor k are number first_chunk[k] to first_chunk[k + 1] - 1.
template <typename Copy>
struct Tensors {
  const float* grad[kTensors];
  float *param[kTensors], *exp_avg[kTensors], *exp_avg_sq[kTensors];
  float* average[kTensors];  // null without averages
  Copy* copy[kTensors];      // null without copies
  int64_t size[kTensors];
  uint32_t first_chunk[kTensors + 1];
  int count;

  __device__ int tensor_of(uint32_t chunk) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      first_chunk[middle] <= chunk ? low = middle : high = middle - 1;
    }
    return low;
  }
};

// The one-number tensors on the device.
struct AdamState {
  int* found;  // not finite: set to 1
  float* step;
  int64_t* skipped;
  const double *lr, *average_weight;
};

// The natural logarithms of the betas: 1 - beta^t = -expm1(t log beta).
struct LogBetas {
  double first, second;
};

template <typename Copy>
__global__ void __launch_bounds__(kThreads) adam_ema_check_kernel(const __grid_constant__ Tensors<Copy> t, int* found) {
  const int k = t.tensor_of(blockIdx.x);
  const int64_t first = (blockIdx.x - t.first_chunk[k]) * kChunk;
  const int64_t last = min(first + kChunk, t.size[k]);
  const float* g = t.grad[k];
  bool finite = true;
#pragma unroll 4
  for (int64_t i = first + threadIdx.x; i < last; i += kThreads) finite &= isfinite(g[i]);
  if (!finite) *found = 1;  // every thread that writes writes the same
}

__global__ inline void adam_ema_count_kernel(AdamState s) {
  if (*s.found) {
    *s.skipped += 1;
  } else {
    *s.step += 1;
  }
}

// torch.lerp, which goes from the nearer end
__device__ inline float lerp(float from, float to, float weight) {
  return weight < 0.5f ? from + weight * (to - from) : to - (to - from) * (1 - weight);
}

template <typename Copy>
__global__ void __launch_bounds__(kThreads)
    adam_ema_update_kernel(const __grid_constant__ Tensors<Copy> t, AdamState s, AdamOptions o, LogBetas log) {
  if (*s.found) return;
  __shared__ float step_size, root_correction;
  if (threadIdx.x == 0) {
    const double step = *s.step;
    step_size = static_cast<float>(*s.lr / -expm1(step * log.first));
    root_correction = static_cast<float>(sqrt(-expm1(step * log.second)));
  }
  __syncthreads();
  const int k = t.tensor_of(blockIdx.x);
  const int64_t first = (blockIdx.x - t.first_chunk[k]) * kChunk;
  const int64_t last = min(first + kChunk, t.size[k]);
  const float* const grad = t.grad[k];
  float *const param = t.param[k], *const exp_avg = t.exp_avg[k], *const exp_avg_sq = t.exp_avg_sq[k];
  float* const average = t.average[k];
  Copy* const copy = t.copy[k];
  const auto average_weight = static_cast<float>(*s.average_weight), eps = static_cast<float>(o.eps);
  const auto rest1 = static_cast<float>(1 - o.beta1), weight_decay = static_cast<float>(o.weight_decay);
  const auto beta2 = static_cast<float>(o.beta2), rest2 = static_cast<float>(1 - o.beta2);
  const bool read_first = o.beta1 != 0;  // with beta1 = 0 the first moment is the gradient itself
#pragma unroll 2
  for (int64_t i = first + threadIdx.x; i < last; i += kThreads) {
    const float p = param[i], g = grad[i] + weight_decay * p;
    const float m = read_first ? lerp(exp_avg[i], g, rest1) : g;
    const float v = exp_avg_sq[i] * beta2 + rest2 * g * g;
    const float q = p - step_size * (m / (sqrtf(v) / root_correction + eps));
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    param[i] = q;
    if (average) average[i] = lerp(average[i], q, average_weight);
    if (copy) copy[i] = narrow<Copy>(q);
  }
}

// `batches` groups of tensors, none empty; every pointer dense and in the order of its parameter.
template <typename Copy>
cudaError_t launch_adam_ema(const Tensors<Copy>* batches, int64_t count, const AdamState& s, const AdamOptions& o,
                            cudaStream_t stream) {
  const LogBetas log{std::log(o.beta1), std::log(o.beta2)};
  for (int64_t b = 0; b < count; b++) {
    adam_ema_check_kernel<Copy><<<batches[b].first_chunk[batches[b].count], kThreads, 0, stream>>>(batches[b], s.found);
  }
  adam_ema_count_kernel<<<1, 1, 0, stream>>>(s);
  for (int64_t b = 0; b < count; b++) {
    adam_ema_update_kernel<Copy>
        <<<batches[b].first_chunk[batches[b].count], kThreads, 0, stream>>>(batches[b], s, o, log);
  }
  return cudaGetLastError();
}

}  // namespace gdd_fast::cuda
