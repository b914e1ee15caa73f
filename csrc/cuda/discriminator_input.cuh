// discriminator_input on the GPU. Torch-free: raw pointers, sizes and a stream, so that nvcc alone can compile it.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cuda/floats.cuh"
#include "discriminator_input.h"

namespace gdd_fast::cuda {

template <typename T>
struct Pointers {
  T* at[kBackbones];
};

// A thread makes one number of every backbone's input, in memory order (n, i, j, c).
template <typename X, typename Y>
__global__ void __launch_bounds__(256)
    discriminator_input_kernel(const X* __restrict__ x, Pointers<Y> ys, DiscriminatorInput d) {
  const int64_t count = d.size * d.size * 3;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t n = blockIdx.y; n < d.images; n += gridDim.y) {
    for (int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; k < count; k += step) {
      const auto rest = static_cast<uint32_t>(k), pixel = rest / 3, c = rest - pixel * 3;
      const auto size = static_cast<uint32_t>(d.size), i = pixel / size, j = pixel - i * size;
      const Blend row = blend(i, d.height, d.step_h), column = blend(j, d.width, d.step_w);
      const X* in = x + n * d.stride_n + (d.channels == 1 ? 0 : c) * d.stride_c;
      const auto read = [&](int64_t h, int64_t w) { return widen(in[h * d.stride_h + w * d.stride_w]); };
      const auto across = static_cast<float>(column.weight), down = static_cast<float>(row.weight);
      const float upper = (1 - across) * read(row.low, column.low) + across * read(row.low, column.high);
      const float lower = (1 - across) * read(row.high, column.low) + across * read(row.high, column.high);
      const float value = (1 - down) * upper + down * lower;
#pragma unroll
      for (int b = 0; b < kBackbones; b++) {
        if (b < d.backbones) ys.at[b][n * count + k] = narrow<Y>(value * d.scale[b][c] + d.shift[b][c]);
      }
    }
  }
}

// The outputs that input h has a share in are among first ... last.
struct Outputs {
  int64_t first, last;

  __device__ Outputs(int64_t h, int64_t in, int64_t out) {
    const double ratio = static_cast<double>(out) / static_cast<double>(in);
    // one more on each side than exact arithmetic has: `share` gives those nothing
    first = h == 0 ? 0 : max(static_cast<int64_t>((h - 0.5) * ratio - 0.5) - 1, int64_t{0});
    last = h == in - 1 ? out - 1 : min(static_cast<int64_t>((h + 1.5) * ratio - 0.5) + 1, out - 1);
  }
};

__device__ inline float share(const Blend& at, int64_t h) {
  const auto weight = static_cast<float>(at.weight);
  return (at.low == h ? 1 - weight : 0.f) + (at.high == h ? weight : 0.f);
}

// A thread gathers the gradient of one number of x, in a fixed order: no atomics, the same bits every time. The
// gradients are channels_last.
template <typename X, typename Y>
__global__ void __launch_bounds__(256)
    discriminator_input_backward_kernel(Pointers<const Y> dys, X* __restrict__ dx, DiscriminatorInput d) {
  const int64_t count = d.height * d.width * d.channels;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t n = blockIdx.y; n < d.images; n += gridDim.y) {
    for (int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; k < count; k += step) {
      const int64_t c = k % d.channels, pixel = k / d.channels, w = pixel % d.width, h = pixel / d.width;
      const Outputs rows(h, d.height, d.size), columns(w, d.width, d.size);
      float sum = 0;
      for (int64_t i = rows.first; i <= rows.last; i++) {
        const float down = share(blend(i, d.height, d.step_h), h);
        if (down == 0) continue;
        for (int64_t j = columns.first; j <= columns.last; j++) {
          const float weight = down * share(blend(j, d.width, d.step_w), w);
          if (weight == 0) continue;
          const int64_t at = ((n * d.size + i) * d.size + j) * 3;
          for (int b = 0; b < d.backbones; b++) {
            if (d.channels == 3) {
              sum += weight * (d.scale[b][c] * widen(dys.at[b][at + c]));
            } else {
              for (int e = 0; e < 3; e++) sum += weight * (d.scale[b][e] * widen(dys.at[b][at + e]));
            }
          }
        }
      }
      dx[n * d.stride_n + c * d.stride_c + h * d.stride_h + w * d.stride_w] = narrow<X>(sum);
    }
  }
}

inline dim3 grid_for(int64_t numbers, int64_t images) {
  return {static_cast<unsigned>(std::min<int64_t>((numbers + 255) / 256, 65535)),
          static_cast<unsigned>(std::min<int64_t>(images, 65535)), 1};
}

// x has d's strides; ys are (images, size, size, 3), dense, with size below 2^15. Nothing may be empty.
template <typename X, typename Y>
cudaError_t launch_discriminator_input(const X* x, const Pointers<Y>& ys, const DiscriminatorInput& d,
                                       cudaStream_t stream) {
  discriminator_input_kernel<X, Y><<<grid_for(3 * d.size * d.size, d.images), 256, 0, stream>>>(x, ys, d);
  return cudaGetLastError();
}

template <typename X, typename Y>
cudaError_t launch_discriminator_input_backward(const Pointers<const Y>& dys, X* dx, const DiscriminatorInput& d,
                                                cudaStream_t stream) {
  const dim3 grid = grid_for(d.height * d.width * d.channels, d.images);
  discriminator_input_backward_kernel<X, Y><<<grid, 256, 0, stream>>>(dys, dx, d);
  return cudaGetLastError();
}

}  // namespace gdd_fast::cuda
