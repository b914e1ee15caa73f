// What the launchers need to know of resample2d: which inputs contribute to an output.
#pragma once
#include <cstdint>

namespace gdd_fast {

// y = (gain * R(x) + add) * scale. The filter is kernel[a * taps + b], on the larger image's grid. Down, output u takes
// inputs 2 u + a - padding; up, output u takes the inputs i with 2 i + a - padding = u.
struct Resample {
  int64_t images, channels, height, width;  // of x
  int64_t out_height, out_width;
  int64_t stride_n, stride_c, stride_h, stride_w;  // of x, in elements
  int taps, padding;
  bool up, channels_last;  // channels_last: for add and y, which are dense
  double gain, scale;
};

}  // namespace gdd_fast
