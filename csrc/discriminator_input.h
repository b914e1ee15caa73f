// What discriminator_input computes, as far as the launchers need it.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define GDD_FAST_HOST_DEVICE __host__ __device__
#else
#define GDD_FAST_HOST_DEVICE
#endif

namespace gdd_fast {

constexpr int kBackbones = 4;  // at most, in one call

// y[b][n, c, i, j] = scale[b][c] * B(x)[n, c, i, j] + shift[b][c], where B is the bilinear resize (align_corners=False)
// of x, whose channel counts three times if it has only one.
struct DiscriminatorInput {
  int64_t images, channels, height, width, size;   // of x; of a side of y
  int64_t stride_n, stride_c, stride_h, stride_w;  // of x or its gradient, in elements
  double step_h, step_w;  // height / size, width / size: from one number of y to the next, in numbers of x
  int backbones;
  float scale[kBackbones][3], shift[kBackbones][3];
};

// The two inputs of an output along one dimension, and the weight of the second.
struct Blend {
  int64_t low, high;
  double weight;
};

GDD_FAST_HOST_DEVICE inline Blend blend(int64_t i, int64_t in, double step) {
  const double at = (static_cast<double>(i) + 0.5) * step - 0.5;
  const double inside = at > 0 ? at : 0;
  int64_t low = static_cast<int64_t>(inside);
  if (low > in - 1) low = in - 1;
  return {low, low < in - 1 ? low + 1 : low, inside - static_cast<double>(low)};
}

}  // namespace gdd_fast
