// resample2d on the GPU. Torch-free: raw pointers, sizes and a stream, so that nvcc alone can compile it.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cuda/floats.cuh"
#include "resample2d.h"

namespace gdd_fast::cuda {

// Along one dimension, the outputs that a thread makes and their inputs: those at `first`, `first + direction`, ... Going
// up, outputs `out` and `out + 1` have the same inputs: one takes the filter's even taps, the other its odd ones.
template <bool Up, typename Int>
struct Inputs {
  static constexpr int kOutputs = Up ? 2 : 1, direction = Up ? -1 : 1;
  Int out, first;

  __device__ Inputs(Int number, int padding)
      : out(Up ? 2 * number - padding % 2 : number), first(Up ? number + padding / 2 : 2 * number - padding) {}

  __device__ static int tap(int input, int output) { return Up ? 2 * input + output : input; }

  // How many of these there are for `size` outputs.
  static int64_t count(int64_t size, int padding) { return Up ? (size + padding % 2 + 1) / 2 : size; }
};

// A thread makes one output pixel going down and 2 x 2 going up, N neighbouring channels of each: N > 1 where channels
// are innermost. `Index` numbers these groups: 32 bits where they suffice, for the sake of the divisions. `Taps` is the
// filter's size, 0 for one known at run time.
template <typename T, typename Index, int N, int Taps, bool Up, bool ChannelsLast>
__global__ void __launch_bounds__(256)
    resample2d_kernel(const T* __restrict__ x, const Real<T>* __restrict__ kernel, const T* __restrict__ add,
                      T* __restrict__ y, Resample r, Index groups_down, Index groups_across, int64_t groups) {
  using R = Real<T>;
  using Int = std::make_signed_t<Index>;
  using Along = Inputs<Up, Int>;
  constexpr int kSide = Along::kOutputs;
  const int taps = Taps > 0 ? Taps : r.taps, count = Up ? taps / 2 : taps;
  const auto channel_groups = static_cast<Index>(r.channels / N);
  const auto height = static_cast<Index>(r.height), width = static_cast<Index>(r.width);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t group = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; group < groups; group += step) {
    Index rest = static_cast<Index>(group), c, v, u;
    if (ChannelsLast) {
      c = rest % channel_groups * N, rest /= channel_groups;
      v = rest % groups_across, rest /= groups_across;
      u = rest % groups_down, rest /= groups_down;
    } else {
      v = rest % groups_across, rest /= groups_across;
      u = rest % groups_down, rest /= groups_down;
      c = rest % channel_groups * N, rest /= channel_groups;
    }
    const Along rows(static_cast<Int>(u), r.padding), columns(static_cast<Int>(v), r.padding);
    const T* image = x + static_cast<int64_t>(rest) * r.stride_n + static_cast<int64_t>(c) * r.stride_c;
    R sum[kSide][kSide][N] = {};
#pragma unroll
    for (int s = 0; s < count; s++) {
      const Int i = rows.first + s * Along::direction;
      if (static_cast<Index>(i) >= height || i < 0) continue;
#pragma unroll
      for (int t = 0; t < count; t++) {
        const Int j = columns.first + t * Along::direction;
        if (static_cast<Index>(j) >= width || j < 0) continue;
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
        const int64_t i = rows.out + a, j = columns.out + b;
        if (i < 0 || i >= r.out_height || j < 0 || j >= r.out_width) continue;
        const int64_t plane = ChannelsLast ? rest : rest * r.channels + c;
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
  const int64_t down = Inputs<Up, int64_t>::count(r.out_height, r.padding);
  const int64_t across = Inputs<Up, int64_t>::count(r.out_width, r.padding);
  const int64_t groups = r.images * r.channels / N * down * across;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((groups + kThreads - 1) / kThreads, INT32_MAX));
  if (groups <= INT32_MAX / 4 && std::max(r.height, r.width) <= INT32_MAX / 4) {
    resample2d_kernel<T, uint32_t, N, Taps, Up, ChannelsLast><<<blocks, kThreads, 0, stream>>>(
        x, kernel, add, y, r, static_cast<uint32_t>(down), static_cast<uint32_t>(across), groups);
  } else {
    resample2d_kernel<T, int64_t, N, Taps, Up, ChannelsLast>
        <<<blocks, kThreads, 0, stream>>>(x, kernel, add, y, r, down, across, groups);
  }
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

// `add` may be null; `add` and `y` are dense, channels_last or contiguous as `r` says. Nothing may be empty.
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
