// to_uint8 on the GPU. Torch-free: raw pointers, sizes and a stream, so that nvcc alone can compile it.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cuda/floats.cuh"

namespace gdd_fast::cuda {

// The _rn intrinsics round the product before the sum: the compiler may not fuse them.
__device__ inline uint8_t to_byte(float x) {
  const float y = __fadd_rn(__fmul_rn(x, 127.5f), 128.f);
  return static_cast<uint8_t>(static_cast<int32_t>(fminf(fmaxf(y, 0.f), 255.f)));  // fmaxf(NaN, 0) is 0
}

__device__ inline uint8_t to_byte(double x) {
  const double y = __dadd_rn(__dmul_rn(x, 127.5), 128.);
  return static_cast<uint8_t>(static_cast<int32_t>(fmin(fmax(y, 0.), 255.)));
}

__device__ inline uint8_t to_byte(__half x) { return to_byte(__half2float(x)); }
__device__ inline uint8_t to_byte(__nv_bfloat16 x) { return to_byte(__bfloat162float(x)); }

// A thread makes N neighbouring bytes of the output, so that enough loads are under way at a time. `Index` counts the
// bytes of one image: 32 bits where they suffice, because the division by the number of channels is several times
// cheaper than in 64.
template <typename T, typename Index, int N>
__global__ void __launch_bounds__(256)
    to_uint8_kernel(const T* __restrict__ x, uint8_t* __restrict__ y, int64_t images, Index channels, Index image_size,
                    int64_t stride_image, int64_t stride_channel, int64_t stride_pixel) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * N;
  for (int64_t n = blockIdx.y; n < images; n += gridDim.y) {
    const T* in = x + n * stride_image;
    uint8_t* out = y + n * static_cast<int64_t>(image_size);
    for (int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N; i < image_size; i += step) {
      Index pixel = static_cast<Index>(i) / channels;
      Index channel = static_cast<Index>(i) - pixel * channels;
      Vector<uint8_t, N> bytes;
#pragma unroll
      for (int e = 0; e < N; e++) {
        bytes.at[e] = to_byte(in[channel * stride_channel + pixel * stride_pixel]);
        if (++channel == channels) channel = 0, pixel++;
      }
      store(out + i, bytes);
    }
  }
}

template <typename T, int N>
void launch_to_uint8_groups(const T* x, uint8_t* y, int64_t images, int64_t channels, int64_t size,
                            int64_t stride_image, int64_t stride_channel, int64_t stride_pixel, cudaStream_t stream) {
  constexpr int kThreads = 256;
  const int64_t groups = size / N;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>((groups + kThreads - 1) / kThreads, INT32_MAX)),
                  static_cast<unsigned>(std::min<int64_t>(images, 65535)));
  if (size <= INT32_MAX) {
    to_uint8_kernel<T, uint32_t, N><<<grid, kThreads, 0, stream>>>(x, y, images, static_cast<uint32_t>(channels),
                                                                   static_cast<uint32_t>(size), stride_image,
                                                                   stride_channel, stride_pixel);
  } else {
    to_uint8_kernel<T, int64_t, N>
        <<<grid, kThreads, 0, stream>>>(x, y, images, channels, size, stride_image, stride_channel, stride_pixel);
  }
}

// Strides in elements; y is (images, pixels, channels), contiguous. Nothing may be empty.
template <typename T>
cudaError_t launch_to_uint8(const T* x, uint8_t* y, int64_t images, int64_t channels, int64_t pixels,
                            int64_t stride_image, int64_t stride_channel, int64_t stride_pixel, cudaStream_t stream) {
  const int64_t size = channels * pixels;
  const bool whole = size % 4 == 0 && reinterpret_cast<uintptr_t>(y) % 4 == 0;
  const auto launch = whole ? launch_to_uint8_groups<T, 4> : launch_to_uint8_groups<T, 1>;
  launch(x, y, images, channels, size, stride_image, stride_channel, stride_pixel, stream);
  return cudaGetLastError();
}

}  // namespace gdd_fast::cuda
