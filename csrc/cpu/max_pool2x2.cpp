// max_pool2x2 on the CPU, parallel over rows of the output; channels, where innermost, run in vectors.
#include "max_pool2x2.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>

namespace gdd_fast::cpu {
namespace {

// body(offset of the window's first value in the input, offset of its result, count of neighbouring windows)
template <typename Body>
void for_windows(const PoolSize& s, const Body& body) {
  const int64_t rows = s.height / 2, columns = s.width / 2, line = s.width * s.channels;
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, 4 * columns * s.channels));
  at::parallel_for(0, s.images * rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const int64_t top = (row / rows * s.height + row % rows * 2) * line;
      for (int64_t column = 0; column < columns; column++) {
        body(top + column * 2 * s.channels, (row * columns + column) * s.channels, s.channels);
      }
    }
  });
}

}  // namespace

void max_pool2x2(const at::Tensor& x, const PoolSize& s, at::Tensor& y, at::Tensor& places) {
  const int64_t offsets[4] = {0, s.channels, s.width * s.channels, (s.width + 1) * s.channels};
  uint8_t* place = places.mutable_data_ptr<uint8_t>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "max_pool2x2", [&] {
    const scalar_t* in = x.const_data_ptr<scalar_t>();
    scalar_t* out = y.mutable_data_ptr<scalar_t>();
    for_windows(s, [&](int64_t from, int64_t to, int64_t count) {
      for (int64_t c = 0; c < count; c++) {
        scalar_t best = in[from + c];
        uint8_t where = 0;
        for (uint8_t i = 1; i < 4; i++) {
          const scalar_t value = in[from + offsets[i] + c];
          const bool larger = value > best || value != value;  // the first of equal values; NaN wins
          best = larger ? value : best;
          where = larger ? i : where;
        }
        out[to + c] = best;
        place[to + c] = where;
      }
    });
  });
}

void max_pool2x2_backward(const at::Tensor& dy, const at::Tensor& places, const PoolSize& s, at::Tensor& dx) {
  const int64_t offsets[4] = {0, s.channels, s.width * s.channels, (s.width + 1) * s.channels};
  const uint8_t* place = places.const_data_ptr<uint8_t>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, dy.scalar_type(), "max_pool2x2_backward", [&] {
    const scalar_t* in = dy.const_data_ptr<scalar_t>();
    scalar_t* out = dx.mutable_data_ptr<scalar_t>();
    for_windows(s, [&](int64_t to, int64_t from, int64_t count) {
      for (uint8_t i = 0; i < 4; i++) {
        for (int64_t c = 0; c < count; c++) {
          out[to + offsets[i] + c] = place[from + c] == i ? in[from + c] : scalar_t(0);
        }
      }
    });
  });
}

}  // namespace gdd_fast::cpu
