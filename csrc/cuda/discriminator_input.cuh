// discriminator_input on the GPU. Torch-free: raw pointers, sizes and a stream, so that nvcc alone can compile it.
//
// Outputs are to inputs as `size` is to `in`, so positions are fractions of 2 size: exact, and the next is one addition
// away. A thread keeps to one column of the large images and walks down its rows: what it needs of the column it finds
// once, and threads side by side touch memory side by side.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cuda/floats.cuh"
#include "discriminator_input.h"

namespace gdd_fast::cuda {

constexpr int kThreads2d = 256;
constexpr int kForwardRows = 32;  // of y, per thread
constexpr int kBand = 4;          // rows of dx, per block: those of the gradients between two bands are read twice
constexpr int kTile = 64;         // columns of dx, per block
constexpr int kColumns = 256;     // columns of the gradients whose sums a block holds at a time
constexpr int kAhead = 4;         // rows of the gradients that a thread loads at once

template <typename T>
struct Pointers {
  T* at[kBackbones];
};

// Where output i lies between inputs `low` and `low + 1`: `rest` / (2 size) of the way. The first and the last input
// reach beyond the image's ends.
struct Position {
  int low, rest, whole_step, rest_step, period, last;
  float share;  // 1 / period

  // (2 i + 1) in / (2 size) - 1 / 2, with `in` taken apart so that 32 bits suffice for sizes below 2^15.
  __device__ Position(int i, int64_t inputs, int64_t outputs) {
    const int in = static_cast<int>(inputs), size = static_cast<int>(outputs);
    const int whole = in / size, part = in - whole * size;
    const uint32_t rests = static_cast<uint32_t>(part) * (2 * i + 1) + (1 + whole % 2) * size;  // one input too many
    whole_step = whole, rest_step = 2 * part, period = 2 * size, last = in - 1, share = 1 / static_cast<float>(period);
    low = i * whole + whole / 2 + static_cast<int>(rests / period) - 1;
    rest = static_cast<int>(rests % period);
  }

  __device__ void next() {
    low += whole_step, rest += rest_step;
    if (rest >= period) rest -= period, low++;
  }

  __device__ int lower() const { return max(low, 0); }
  __device__ int higher() const { return min(low + 1, last); }
  __device__ float weight() const { return static_cast<float>(rest) * share; }
};

// The first output whose `low` is at least `low`, or `size`; 32 bits suffice for `in` below 2^16.
__device__ inline int first_output(int low, int64_t inputs, int64_t outputs) {
  const auto in = static_cast<uint32_t>(inputs), size = static_cast<uint32_t>(outputs);
  if (low < 0 || size * (2 * low + 1) <= in) return 0;
  return static_cast<int>(min((size * (2 * low + 1) + in - 1) / (2 * in), size));
}

// A thread makes one number (j, c) of kForwardRows rows of every backbone's input: blockIdx.y is such a band of rows,
// blockIdx.z the image.
template <typename X, typename Y>
__global__ void __launch_bounds__(kThreads2d, 4)
    discriminator_input_kernel(const X* __restrict__ x, Pointers<Y> ys, DiscriminatorInput d, int bands) {
  const int size = static_cast<int>(d.size), numbers = 3 * size;
  const int k = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (k >= numbers) return;
  const int j = k / 3, c = k - 3 * j;
  const Position column(j, d.width, d.size);
  const float across = column.weight();
  const int64_t low = column.lower() * d.stride_w, high = column.higher() * d.stride_w;
  float scale[kBackbones], shift[kBackbones];
#pragma unroll
  for (int b = 0; b < kBackbones; b++) scale[b] = d.scale[b][c], shift[b] = d.shift[b][c];
  for (int64_t n = blockIdx.z; n < d.images; n += gridDim.z) {
    const X* const in = x + n * d.stride_n + (d.channels == 1 ? 0 : c) * d.stride_c;
    const auto blend_row = [&](int h) {
      const X* const row = in + h * d.stride_h;
      return (1 - across) * widen(row[low]) + across * widen(row[high]);
    };
    for (int band = static_cast<int>(blockIdx.y); band < bands; band += gridDim.y) {
      const int begin = band * kForwardRows, end = min(begin + kForwardRows, size);
      Position row(begin, d.height, d.size);
      int held = row.low - 1;
      float upper = 0, lower = 0;
      int64_t at = (n * size + begin) * numbers + k;
      for (int i = begin; i < end; i++, at += numbers, row.next()) {
        if (row.low != held) upper = blend_row(row.lower()), lower = blend_row(row.higher()), held = row.low;
        const float down = row.weight(), value = (1 - down) * upper + down * lower;
#pragma unroll
        for (int b = 0; b < kBackbones; b++) {
          if (b < d.backbones) ys.at[b][at] = narrow<Y>(value * scale[b] + shift[b]);
        }
      }
    }
  }
}

// What number k = 3 j + c of the rows of the gradients gives to rows `top` to top + height - 1 of dx, all backbones
// together: in sums[0], sums[kStride], ...
constexpr int kStride = 3 * kColumns;
template <typename Y>
__device__ inline void sum_down(const Pointers<const Y>& dys, const DiscriminatorInput& d, int64_t n, int top,
                                int height, int k, float* sums) {
  const int numbers = 3 * static_cast<int>(d.size);
  const int begin = first_output(top - 1, d.height, d.size), end = first_output(top + height, d.height, d.size);
  const auto flush = [&](int h, float sum) {
    if (h >= top && h < top + height) sums[(h - top) * kStride] += sum;
  };
  for (int h = 0; h < height; h++) sums[h * kStride] = 0;
  float scale[kBackbones];
#pragma unroll
  for (int b = 0; b < kBackbones; b++) scale[b] = d.scale[b][k % 3];
  Position row(begin, d.height, d.size);
  int above = row.lower(), below = row.higher();  // the two rows of dx that a row of the gradients lies between
  float upper = 0, lower = 0;                     // and what has been summed for them
  int64_t at = (n * d.size + begin) * numbers + k;
  for (int i = begin; i < end; i += kAhead) {
    float dy[kAhead] = {};
#pragma unroll
    for (int e = 0; e < kAhead; e++, at += numbers) {
#pragma unroll
      for (int b = 0; b < kBackbones; b++) {
        if (b < d.backbones && i + e < end) dy[e] += scale[b] * widen(dys.at[b][at]);
      }
    }
#pragma unroll
    for (int e = 0; e < kAhead; e++, row.next()) {
      if (row.lower() != above || row.higher() != below) {
        flush(above, upper), flush(below, lower);
        above = row.lower(), below = row.higher(), upper = lower = 0;
      }
      const float down = row.weight();
      upper += (1 - down) * dy[e], lower += down * dy[e];
    }
  }
  flush(above, upper), flush(below, lower);
}

// What columns `first` to first + columns - 1 give to column w of dx. `sums` are those of one row, from `first` on; of
// channel c, or of all three for a grey image.
__device__ inline float sum_across(const float* sums, const DiscriminatorInput& d, int first, int columns, int w,
                                   int c) {
  const int from = max(first, first_output(w - 1, d.width, d.size));
  const int to = min(first + columns, first_output(w + 1, d.width, d.size));
  float total = 0;
  Position column(from, d.width, d.size);
  for (int j = from; j < to; j++, column.next()) {
    const float across = column.weight(), *const at = sums + 3 * (j - first);
    const float share = (column.lower() == w ? 1 - across : 0.f) + (column.higher() == w ? across : 0.f);
    total += share * (d.channels == 3 ? at[c] : at[0] + at[1] + at[2]);
  }
  return total;
}

// A block makes kBand rows and kTile columns of dx: it sums the gradients, which are channels_last, down their columns,
// kColumns at a time, then across. Every number has one thread that adds to it, in a fixed order: no atomics, the same
// bits every time. blockIdx is the tile, the band and the image.
template <typename X, typename Y>
__global__ void __launch_bounds__(kThreads2d, 4)
    discriminator_input_backward_kernel(Pointers<const Y> dys, X* __restrict__ dx, DiscriminatorInput d, int bands) {
  __shared__ float sums[kBand * kStride];
  __shared__ float totals[kBand * kTile * 3];
  const int thread = static_cast<int>(threadIdx.x), channels = static_cast<int>(d.channels);
  const int tile = static_cast<int>(blockIdx.x) * kTile, width = min(kTile, static_cast<int>(d.width) - tile);
  const int begin = first_output(tile - 1, d.width, d.size), end = first_output(tile + width, d.width, d.size);
  for (int64_t n = blockIdx.z; n < d.images; n += gridDim.z) {
    for (int band = static_cast<int>(blockIdx.y); band < bands; band += gridDim.y) {
      const int top = band * kBand, height = min(kBand, static_cast<int>(d.height) - top);
      const int outputs = height * width * channels;  // of the block; number o belongs to one thread
      for (int o = thread; o < outputs; o += kThreads2d) totals[o] = 0;
      for (int first = begin; first < end; first += kColumns) {
        const int columns = min(kColumns, end - first);
        for (int k = thread; k < 3 * columns; k += kThreads2d) {
          sum_down(dys, d, n, top, height, 3 * first + k, sums + k);
        }
        __syncthreads();
        for (int o = thread; o < outputs; o += kThreads2d) {
          const int w = o / channels % width, h = o / (channels * width);
          totals[o] += sum_across(sums + h * kStride, d, first, columns, tile + w, o % channels);
        }
        __syncthreads();
      }
      for (int o = thread; o < outputs; o += kThreads2d) {
        const int c = o % channels, w = tile + o / channels % width, h = top + o / (channels * width);
        dx[n * d.stride_n + c * d.stride_c + h * d.stride_h + w * d.stride_w] = narrow<X>(totals[o]);
      }
    }
  }
}

inline dim3 grid_of(int64_t blocks, int64_t bands, int64_t images) {
  const auto most = [](int64_t count) { return static_cast<unsigned>(std::min<int64_t>(count, 65535)); };
  return {static_cast<unsigned>(blocks), most(bands), most(images)};
}

// x has d's strides, and sides below 2^16; ys are (images, size, size, 3), dense, with size below 2^15. Nothing may be
// empty.
template <typename X, typename Y>
cudaError_t launch_discriminator_input(const X* x, const Pointers<Y>& ys, const DiscriminatorInput& d,
                                       cudaStream_t stream) {
  const auto bands = static_cast<int>((d.size + kForwardRows - 1) / kForwardRows);
  const dim3 grid = grid_of((3 * d.size + kThreads2d - 1) / kThreads2d, bands, d.images);
  discriminator_input_kernel<X, Y><<<grid, kThreads2d, 0, stream>>>(x, ys, d, bands);
  return cudaGetLastError();
}

template <typename X, typename Y>
cudaError_t launch_discriminator_input_backward(const Pointers<const Y>& dys, X* dx, const DiscriminatorInput& d,
                                                cudaStream_t stream) {
  const auto bands = static_cast<int>((d.height + kBand - 1) / kBand);
  const dim3 grid = grid_of((d.width + kTile - 1) / kTile, bands, d.images);
  discriminator_input_backward_kernel<X, Y><<<grid, kThreads2d, 0, stream>>>(dys, dx, d, bands);
  return cudaGetLastError();
}

}  // namespace gdd_fast::cuda
