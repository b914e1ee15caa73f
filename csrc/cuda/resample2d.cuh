// resample2d on the GPU. Torch-free: raw pointers, sizes and a stream, so that nvcc alone can compile it.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cuda/floats.cuh"
#include "resample2d.h"

namespace gdd_fast::cuda {

// Along one dimension, the outputs of a thread and their inputs: those at `first`, `first + direction`, ... Upsampling,
// outputs `out` and `out + 1` have the same inputs: one takes the filter's even taps, the other its odd ones.
template <bool Up>
struct Inputs {
  static constexpr int kOutputs = Up ? 2 : 1, direction = Up ? -1 : 1;
  int out, first;

  __device__ Inputs(int number, int padding)
      : out(Up ? 2 * number - padding % 2 : number), first(Up ? number + padding / 2 : 2 * number - padding) {}

  __device__ static int tap(int input, int output) { return Up ? 2 * input + output : input; }

  // The number of these for `size` outputs.
  static int64_t count(int64_t size, int padding) { return Up ? (size + padding % 2 + 1) / 2 : size; }
};

// A thread computes one output pixel (downsampling) or 2 x 2 (upsampling), N neighbouring channels of each: N > 1 only
// if channels are innermost. An image has `down` x `across` such units per channel, and blockIdx.y is the image. `Taps`
// is the filter's size, 0 if known only at run time.
template <typename T, int N, int Taps, bool Up, bool ChannelsLast>
__global__ void __launch_bounds__(256, 3)
    resample2d_kernel(const T* __restrict__ x, const Real<T>* __restrict__ kernel, const T* __restrict__ add,
                      T* __restrict__ y, Resample r, uint32_t down, uint32_t across) {
  using R = Real<T>;
  using Along = Inputs<Up>;
  constexpr int kSide = Along::kOutputs;
  const int taps = Taps > 0 ? Taps : r.taps, count = Up ? taps / 2 : taps;
  const int height = static_cast<int>(r.height), width = static_cast<int>(r.width);
  const auto channel_groups = static_cast<uint32_t>(r.channels / N);
  uint32_t rest = blockIdx.x * blockDim.x + threadIdx.x, c, v, u;
  if (ChannelsLast) {
    c = rest % channel_groups * N, rest /= channel_groups;
    v = rest % across, u = rest / across;
    if (u >= down) return;
  } else {
    v = rest % across, rest /= across;
    u = rest % down, c = rest / down * N;
    if (c >= r.channels) return;
  }
  const Along rows(static_cast<int>(u), r.padding), columns(static_cast<int>(v), r.padding);
  for (int64_t n = blockIdx.y; n < r.images; n += gridDim.y) {
    const T* const image = x + n * r.stride_n + c * r.stride_c;
    R sum[kSide][kSide][N] = {};
#pragma unroll
    for (int s = 0; s < count; s++) {
      const int i = rows.first + s * Along::direction;
      if (i < 0 || i >= height) continue;
#pragma unroll
      for (int t = 0; t < count; t++) {
        const int j = columns.first + t * Along::direction;
        if (j < 0 || j >= width) continue;
        const auto in = load<N>(image + i * r.stride_h + j * r.stride_w);
#pragma unroll
        for (int a = 0; a < kSide; a++) {
#pragma unroll
          for (int b = 0; b < kSide; b++) {
            const R weight = kernel[Along::tap(s, a) * taps + Along::tap(t, b)];
#pragma unroll
            for (int e = 0; e < N; e++) sum[a][b][e] += weight * widen(in.at[e]);
          }
        }
      }
    }
#pragma unroll
    for (int a = 0; a < kSide; a++) {
#pragma unroll
      for (int b = 0; b < kSide; b++) {
        const int i = rows.out + a, j = columns.out + b;
        if (i < 0 || i >= r.out_height || j < 0 || j >= r.out_width) continue;
        const int64_t plane = ChannelsLast ? n : n * r.channels + c;
        const int64_t pixel = (plane * r.out_height + i) * r.out_width + j;
        const int64_t at = ChannelsLast ? pixel * r.channels + c : pixel;
        Vector<T, N> added{}, out;
        if (add) added = load<N>(add + at);
#pragma unroll
        for (int e = 0; e < N; e++) {
          R value = sum[a][b][e] * static_cast<R>(r.gain);
          if (add) value += widen(added.at[e]);
          out.at[e] = narrow<T>(value * static_cast<R>(r.scale));
        }
        store(y + at, out);
      }
    }
  }
}

template <typename T, int N, int Taps, bool Up, bool ChannelsLast>
void launch_resample2d_groups(const T* x, const Real<T>* kernel, const T* add, T* y, const Resample& r,
                              cudaStream_t stream) {
  constexpr int kThreads = 256;
  const auto down = static_cast<uint32_t>(Inputs<Up>::count(r.out_height, r.padding));
  const auto across = static_cast<uint32_t>(Inputs<Up>::count(r.out_width, r.padding));
  const int64_t groups = r.channels / N * down * across;
  const dim3 grid(static_cast<unsigned>((groups + kThreads - 1) / kThreads),
                  static_cast<unsigned>(std::min<int64_t>(r.images, 65535)));
  resample2d_kernel<T, N, Taps, Up, ChannelsLast><<<grid, kThreads, 0, stream>>>(x, kernel, add, y, r, down, across);
}

template <typename T, int Taps, bool Up>
void launch_resample2d_layout(const T* x, const Real<T>* kernel, const T* add, T* y, const Resample& r,
                              cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const auto aligned = [](const T* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool whole = r.channels % kVector == 0 && r.stride_n % kVector == 0 && r.stride_h % kVector == 0 &&
                     r.stride_w % kVector == 0 && aligned(x) && aligned(add) && aligned(y);
  if (!r.channels_last) {
    launch_resample2d_groups<T, 1, Taps, Up, false>(x, kernel, add, y, r, stream);
  } else if (whole) {
    launch_resample2d_groups<T, kVector, Taps, Up, true>(x, kernel, add, y, r, stream);
  } else {
    launch_resample2d_groups<T, 1, Taps, Up, true>(x, kernel, add, y, r, stream);
  }
}

// `add` may be null; `add` and `y` are dense, channels_last or contiguous as `r` says, and an image has fewer than 2^31
// numbers. Nothing may be empty.
template <typename T>
cudaError_t launch_resample2d(const T* x, const Real<T>* kernel, const T* add, T* y, const Resample& r,
                              cudaStream_t stream) {
  const auto launch = [&]<int Taps>() {
    r.up ? launch_resample2d_layout<T, Taps, true>(x, kernel, add, y, r, stream)
         : launch_resample2d_layout<T, Taps, false>(x, kernel, add, y, r, stream);
  };
  if (r.taps == 2) {
    launch.template operator()<2>();
  } else if (r.taps == 4) {
    launch.template operator()<4>();
  } else {
    launch.template operator()<0>();
  }
  return cudaGetLastError();
}

}  // namespace gdd_fast::cuda
