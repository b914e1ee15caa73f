// resample2d on the GPU. Torch-free: raw pointers, sizes and a stream, so that nvcc alone can compile it.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cuda/floats.cuh"
#include "resample2d.h"

namespace gdd_fast::cuda {

// The inputs of one output along one dimension: at `first`, `first + direction`, ... with taps `tap`, `tap + step`, ...
struct Inputs {
  int64_t first;
  int tap, step, direction;

  __device__ Inputs(bool up, int64_t u, int padding) {
    tap = up ? static_cast<int>((u + padding) & 1) : 0;
    step = up ? 2 : 1;
    direction = up ? -1 : 1;
    first = up ? (u + padding) >> 1 : 2 * u - padding;
  }
};

// A thread makes N neighbouring elements of y in memory order: channels where they are innermost, else (N = 1) one
// pixel of a row. `Index` numbers these groups: 32 bits where they suffice, for the sake of the divisions. `Taps` is
// the filter's size, 0 for one known at run time.
template <typename T, typename Index, int N, int Taps, bool Up, bool ChannelsLast>
__global__ void __launch_bounds__(256)
    resample2d_kernel(const T* __restrict__ x, const float* __restrict__ kernel, const T* __restrict__ add,
                      T* __restrict__ y, Resample r, Index groups) {
  using R = Real<T>;
  const int taps = Taps > 0 ? Taps : r.taps;
  const int count = Up ? taps / 2 : taps;
  const Index channel_groups = static_cast<Index>(r.channels / N);
  const Index height = static_cast<Index>(r.out_height), width = static_cast<Index>(r.out_width);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t group = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; group < groups; group += step) {
    Index rest = static_cast<Index>(group), c, v, u;
    if (ChannelsLast) {
      c = rest % channel_groups * N, rest /= channel_groups;
      v = rest % width, rest /= width;
      u = rest % height, rest /= height;
    } else {
      v = rest % width, rest /= width;
      u = rest % height, rest /= height;
      c = rest % channel_groups * N, rest /= channel_groups;
    }
    const Inputs rows(Up, u, r.padding), columns(Up, v, r.padding);
    const T* image = x + static_cast<int64_t>(rest) * r.stride_n + static_cast<int64_t>(c) * r.stride_c;
    R sum[N] = {};
#pragma unroll
    for (int s = 0; s < count; s++) {
      const int64_t i = rows.first + s * rows.direction;
      if (i < 0 || i >= r.height) continue;
#pragma unroll
      for (int t = 0; t < count; t++) {
        const int64_t j = columns.first + t * columns.direction;
        if (j < 0 || j >= r.width) continue;
        const R weight = kernel[(rows.tap + s * rows.step) * taps + columns.tap + t * columns.step];
        const auto in = *reinterpret_cast<const Vector<T, N>*>(image + i * r.stride_h + j * r.stride_w);
#pragma unroll
        for (int e = 0; e < N; e++) sum[e] += weight * widen(in.at[e]);
      }
    }
    Vector<T, N> added{}, out;
    if (add) added = reinterpret_cast<const Vector<T, N>*>(add)[group];
#pragma unroll
    for (int e = 0; e < N; e++) {
      R value = sum[e] * static_cast<R>(r.gain);
      if (add) value += widen(added.at[e]);
      out.at[e] = narrow<T>(value * static_cast<R>(r.scale));
    }
    reinterpret_cast<Vector<T, N>*>(y)[group] = out;
  }
}

template <typename T, int N, int Taps, bool Up, bool ChannelsLast>
void launch_resample2d_groups(const T* x, const float* kernel, const T* add, T* y, const Resample& r,
                              cudaStream_t stream) {
  constexpr int kThreads = 256;
  const int64_t groups = r.images * r.channels / N * r.out_height * r.out_width;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((groups + kThreads - 1) / kThreads, INT32_MAX));
  if (groups <= INT32_MAX) {
    resample2d_kernel<T, uint32_t, N, Taps, Up, ChannelsLast>
        <<<blocks, kThreads, 0, stream>>>(x, kernel, add, y, r, static_cast<uint32_t>(groups));
  } else {
    resample2d_kernel<T, int64_t, N, Taps, Up, ChannelsLast>
        <<<blocks, kThreads, 0, stream>>>(x, kernel, add, y, r, groups);
  }
}

template <typename T, int Taps, bool Up>
void launch_resample2d_layout(const T* x, const float* kernel, const T* add, T* y, const Resample& r,
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
cudaError_t launch_resample2d(const T* x, const float* kernel, const T* add, T* y, const Resample& r,
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
