// adam_ema_ on the GPU. Torch-free: raw pointers, sizes and a stream, so that nvcc alone can compile it.
//
// Three kernels: look for non-finite numbers, count the step or the skip, update. Each runs over chunks of many
// tensors, whose pointers are in the launch's arguments; nothing waits for the host, so a CUDA graph can capture it.
#pragma once
#include <cmath>
#include <cstdint>

#include "adam_ema.h"
#include "cuda/floats.cuh"

namespace gdd_fast::cuda {

constexpr int kTensors = 512;  // per launch; each further launch would wait for the last blocks of the previous one
constexpr int kChunk = 16384;  // numbers per block; a multiple of kWide
constexpr int kThreads = 256;
constexpr int kWide = 4;  // numbers that a thread loads at once if everything is aligned

// Up to kTensors tensors of one group in chunks: tensor k has chunks first_chunk[k] to first_chunk[k + 1] - 1.
struct Tensors {
  const float* grad[kTensors];
  float *param[kTensors], *exp_avg[kTensors], *exp_avg_sq[kTensors];
  float* average[kTensors];  // null if there are no averages
  int64_t size[kTensors];
  uint32_t first_chunk[kTensors + 1];
  int count, group;
};

// A launch's arguments may take 32,764 bytes since CUDA 12.1, which needs driver 530 or later.
static_assert(sizeof(Tensors) + 256 < 32764);

// One block's data, from its first number on; null as in Tensors.
struct Chunk {
  const float* grad;
  float *param, *exp_avg, *exp_avg_sq, *average;
  int size;

  __device__ Chunk(const Tensors& t, uint32_t number) {
    int low = 0, high = t.count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      t.first_chunk[middle] <= number ? low = middle : high = middle - 1;
    }
    const int64_t first = static_cast<int64_t>(number - t.first_chunk[low]) * kChunk, rest = t.size[low] - first;
    const auto from = [first](auto* p) { return p ? p + first : p; };
    grad = from(t.grad[low]), param = from(t.param[low]), average = from(t.average[low]);
    exp_avg = from(t.exp_avg[low]), exp_avg_sq = from(t.exp_avg_sq[low]);
    size = rest < kChunk ? static_cast<int>(rest) : kChunk;
  }

  // How many of its numbers can be taken kWide at a time.
  __device__ int wide() const {
    const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
    const auto all = address(grad) | address(param) | address(exp_avg) | address(exp_avg_sq) | address(average);
    return all % alignof(Vector<float, kWide>) == 0 ? size - size % kWide : 0;
  }
};

// The one-number tensors on the device, and the learning rates, one per group.
struct AdamState {
  int* found;  // set to 1 by a non-finite number
  float* step;
  int64_t* skipped;
  const double *lr, *average_weight;
};

// The natural logarithms of the betas: 1 - beta^t = -expm1(t log beta).
struct LogBetas {
  double first, second;
};

// Factors of one step, except the two that depend on the count of steps.
struct Factors {
  float rest1, beta2, rest2, eps, weight_decay, average_weight;
  bool read_first;  // with beta1 = 0 the first moment is the gradient itself

  __device__ Factors(const AdamGroup& o, double weight)
      : rest1(static_cast<float>(1 - o.beta1)),
        beta2(static_cast<float>(o.beta2)),
        rest2(static_cast<float>(1 - o.beta2)),
        eps(static_cast<float>(o.eps)),
        weight_decay(static_cast<float>(o.weight_decay)),
        average_weight(static_cast<float>(weight)),
        read_first(o.beta1 != 0) {}
};

template <int N>
__device__ inline bool finite(const float* p) {
  const auto values = load<N>(p);
  bool all = true;
#pragma unroll
  for (int e = 0; e < N; e++) all &= static_cast<bool>(isfinite(values.at[e]));
  return all;
}

__global__ inline void __launch_bounds__(kThreads)
    adam_ema_check_kernel(const __grid_constant__ Tensors t, int* found) {
  const Chunk chunk(t, blockIdx.x);
  const int wide = chunk.wide(), thread = static_cast<int>(threadIdx.x);
  bool all = true;
#pragma unroll 4
  for (int i = thread * kWide; i < wide; i += kThreads * kWide) all &= finite<kWide>(chunk.grad + i);
#pragma unroll 4
  for (int i = wide + thread; i < chunk.size; i += kThreads) all &= finite<1>(chunk.grad + i);
  if (!all) *found = 1;  // every thread that writes stores the same value
}

__global__ inline void adam_ema_count_kernel(AdamState s) {
  if (*s.found) {
    *s.skipped += 1;
  } else {
    *s.step += 1;
  }
}

// torch.lerp, which starts from the nearer end
__device__ inline float lerp(float from, float to, float weight) {
  return weight < 0.5f ? from + weight * (to - from) : to - (to - from) * (1 - weight);
}

// N numbers from number i on. Everything is loaded before anything is stored: the compiler cannot know that the tensors
// do not overlap.
template <int N>
__device__ inline void update(const Chunk& c, int i, const Factors& by, float step_size, float root_correction) {
  const auto grad = load<N>(c.grad + i);
  auto param = load<N>(c.param + i), second = load<N>(c.exp_avg_sq + i);
  Vector<float, N> first{}, average{};
  if (by.read_first) first = load<N>(c.exp_avg + i);
  if (c.average) average = load<N>(c.average + i);
#pragma unroll
  for (int e = 0; e < N; e++) {
    const float p = param.at[e], g = grad.at[e] + by.weight_decay * p;
    first.at[e] = by.read_first ? lerp(first.at[e], g, by.rest1) : g;
    second.at[e] = second.at[e] * by.beta2 + by.rest2 * g * g;
    param.at[e] = p - step_size * (first.at[e] / (sqrtf(second.at[e]) / root_correction + by.eps));
    average.at[e] = lerp(average.at[e], param.at[e], by.average_weight);
  }
  store(c.exp_avg + i, first);
  store(c.exp_avg_sq + i, second);
  store(c.param + i, param);
  if (c.average) store(c.average + i, average);
}

__global__ inline void __launch_bounds__(kThreads)
    adam_ema_update_kernel(const __grid_constant__ Tensors t, AdamState s, AdamGroup o, LogBetas log) {
  if (*s.found) return;
  __shared__ float step_size, root_correction;
  if (threadIdx.x == 0) {
    const double step = *s.step;
    step_size = static_cast<float>(s.lr[t.group] / -expm1(step * log.first));
    root_correction = static_cast<float>(sqrt(-expm1(step * log.second)));
  }
  __syncthreads();
  const Chunk chunk(t, blockIdx.x);
  const Factors by(o, *s.average_weight);
  const int wide = chunk.wide(), thread = static_cast<int>(threadIdx.x);
  // unrolled, these loops spill
#pragma unroll 1
  for (int i = thread * kWide; i < wide; i += kThreads * kWide) {
    update<kWide>(chunk, i, by, step_size, root_correction);
  }
#pragma unroll 1
  for (int i = wide + thread; i < chunk.size; i += kThreads) update<1>(chunk, i, by, step_size, root_correction);
}

// `batches` of tensors, none empty, with their groups' options; all memory dense and in the layout of its parameter.
inline cudaError_t launch_adam_ema(const Tensors* batches, int64_t count, const AdamState& s, const AdamGroup* groups,
                                   cudaStream_t stream) {
  const auto blocks = [&](int64_t b) { return batches[b].first_chunk[batches[b].count]; };
  for (int64_t b = 0; b < count; b++) {
    adam_ema_check_kernel<<<blocks(b), kThreads, 0, stream>>>(batches[b], s.found);
  }
  adam_ema_count_kernel<<<1, 1, 0, stream>>>(s);
  for (int64_t b = 0; b < count; b++) {
    const AdamGroup& o = groups[batches[b].group];
    const LogBetas log{std::log(o.beta1), std::log(o.beta2)};
    adam_ema_update_kernel<<<blocks(b), kThreads, 0, stream>>>(batches[b], s, o, log);
  }
  return cudaGetLastError();
}

}  // namespace gdd_fast::cuda
