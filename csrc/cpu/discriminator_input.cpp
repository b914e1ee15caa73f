// discriminator_input on the CPU. Rows of three interleaved channels are vectorised as rows of numbers: each row of x
// is stretched once, and every row of y is a blend of two such rows. The adjoint goes the same way back.
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <vector>

#include "cpu/floats.h"
#include "cpu/simd.h"
#include "discriminator_input_launchers.h"

namespace gdd_fast::cpu {
namespace {

// Where each number of a stretched row (3 * size, channels innermost) comes from in a row of x (channels innermost).
struct Stretch {
  std::vector<int64_t> low, high;
  std::vector<float> weight;

  explicit Stretch(const DiscriminatorInput& d) {
    for (int64_t j = 0; j < d.size; j++) {
      const Blend at = blend(j, d.width, d.step_w);
      for (int64_t c = 0; c < 3; c++) {
        const int64_t channel = d.channels == 1 ? 0 : c;
        low.push_back(at.low * d.channels + channel);
        high.push_back(at.high * d.channels + channel);
        weight.push_back(static_cast<float>(at.weight));
      }
    }
  }
};

// A row of factors or offsets, one per number in a row of y.
std::vector<float> repeat(const float (&values)[3], int64_t size) {
  std::vector<float> row;
  for (int64_t j = 0; j < size; j++) row.insert(row.end(), values, values + 3);
  return row;
}

template <typename T>
GDD_FAST_INLINE void write_loop(const float* low, const float* high, float weight, const float* scale,
                                const float* shift, T* y, int64_t n) {
  const float rest = 1 - weight;
#pragma GCC ivdep
  for (int64_t r = 0; r < n; r++) y[r] = narrow<T>((rest * low[r] + weight * high[r]) * scale[r] + shift[r]);
}

// low and high may be the same row, so they are added to one after the other.
template <typename T>
GDD_FAST_INLINE void collect_loop(const T* dy, const float* scale, float weight, float* row, int64_t n) {
#pragma GCC ivdep
  for (int64_t r = 0; r < n; r++) row[r] += weight * (scale[r] * widen(dy[r]));
}

// target_clones takes no templates, hence one overload per type
#define GDD_FAST_DISCRIMINATOR_INPUT(T)                                                                               \
  GDD_FAST_SIMD void write(const float* low, const float* high, float weight, const float* scale, const float* shift, \
                           T* y, int64_t n) {                                                                         \
    write_loop<T>(low, high, weight, scale, shift, y, n);                                                             \
  }                                                                                                                   \
  GDD_FAST_SIMD void collect(const T* dy, const float* scale, float weight, float* row, int64_t n) {                  \
    collect_loop<T>(dy, scale, weight, row, n);                                                                       \
  }

GDD_FAST_DISCRIMINATOR_INPUT(float)
GDD_FAST_DISCRIMINATOR_INPUT(at::BFloat16)
GDD_FAST_DISCRIMINATOR_INPUT(at::Half)

template <typename X, typename Y>
void forward(const DiscriminatorInput& d, const X* x, const std::array<Y*, kBackbones>& ys) {
  const Stretch stretch(d);
  const int64_t n = 3 * d.size;
  std::vector<std::vector<float>> scales, shifts;
  for (int b = 0; b < d.backbones; b++) {
    scales.push_back(repeat(d.scale[b], d.size));
    shifts.push_back(repeat(d.shift[b], d.size));
  }
  at::parallel_for(0, d.images * d.size, 32, [&](int64_t begin, int64_t end) {
    std::vector<float> row(d.width * d.channels);
    std::array<std::vector<float>, 2> stretched{std::vector<float>(n), std::vector<float>(n)};
    std::array<int64_t, 2> held{-1, -1};  // which rows of x they are: going down an image, each is made once
    const auto fetch = [&](int64_t image, int64_t i) {
      const int64_t slot = i % 2, wanted = image * d.height + i;
      float* out = stretched[slot].data();
      if (held[slot] == wanted) return static_cast<const float*>(out);
      const X* in = x + image * d.stride_n + i * d.stride_h;
      for (int64_t j = 0; j < d.width; j++) {
        for (int64_t c = 0; c < d.channels; c++) {
          row[j * d.channels + c] = widen(in[j * d.stride_w + c * d.stride_c]);
        }
      }
      for (int64_t r = 0; r < n; r++) {
        out[r] = (1 - stretch.weight[r]) * row[stretch.low[r]] + stretch.weight[r] * row[stretch.high[r]];
      }
      held[slot] = wanted;
      return static_cast<const float*>(out);
    };
    for (int64_t task = begin; task < end; task++) {
      const int64_t image = task / d.size;
      const Blend at = blend(task % d.size, d.height, d.step_h);
      const float* low = fetch(image, at.low);
      const float* high = fetch(image, at.high);
      for (int b = 0; b < d.backbones; b++) {
        write(low, high, static_cast<float>(at.weight), scales[b].data(), shifts[b].data(), ys[b] + task * n, n);
      }
    }
  });
}

template <typename Y, typename X>
void backward(const DiscriminatorInput& d, const std::array<const Y*, kBackbones>& dys, X* dx) {
  const Stretch stretch(d);
  const int64_t n = 3 * d.size;
  std::vector<std::vector<float>> scales;
  for (int b = 0; b < d.backbones; b++) scales.push_back(repeat(d.scale[b], d.size));
  at::parallel_for(0, d.images, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> rows(d.height * n), row(d.width * d.channels);
    for (int64_t image = begin; image < end; image++) {
      std::fill(rows.begin(), rows.end(), 0.f);
      for (int64_t i = 0; i < d.size; i++) {
        const Blend at = blend(i, d.height, d.step_h);
        const float weight = static_cast<float>(at.weight);
        for (int b = 0; b < d.backbones; b++) {
          const Y* dy = dys[b] + (image * d.size + i) * n;
          collect(dy, scales[b].data(), 1 - weight, rows.data() + at.low * n, n);
          collect(dy, scales[b].data(), weight, rows.data() + at.high * n, n);
        }
      }
      for (int64_t i = 0; i < d.height; i++) {
        std::fill(row.begin(), row.end(), 0.f);
        const float* in = rows.data() + i * n;
        for (int64_t r = 0; r < n; r++) {
          row[stretch.low[r]] += (1 - stretch.weight[r]) * in[r];
          row[stretch.high[r]] += stretch.weight[r] * in[r];
        }
        X* out = dx + image * d.stride_n + i * d.stride_h;
        for (int64_t j = 0; j < d.width; j++) {
          for (int64_t c = 0; c < d.channels; c++) {
            out[j * d.stride_w + c * d.stride_c] = narrow<X>(row[j * d.channels + c]);
          }
        }
      }
    }
  });
}

// function(a value of the type).
template <typename Function>
void dispatch(at::ScalarType dtype, Function&& function) {
  switch (dtype) {
    case at::kBFloat16:
      return function(at::BFloat16());
    case at::kHalf:
      return function(at::Half());
    default:
      return function(float());
  }
}

}  // namespace

void discriminator_input(const DiscriminatorInput& d, const at::Tensor& x, std::vector<at::Tensor>& ys) {
  dispatch(x.scalar_type(), [&]<typename X>(X) {
    dispatch(ys[0].scalar_type(), [&]<typename Y>(Y) {
      std::array<Y*, kBackbones> out{};
      for (int b = 0; b < d.backbones; b++) out[b] = ys[b].mutable_data_ptr<Y>();
      forward<X, Y>(d, x.const_data_ptr<X>(), out);
    });
  });
}

void discriminator_input_backward(const DiscriminatorInput& d, at::TensorList dys, at::Tensor& dx) {
  dispatch(dys[0].scalar_type(), [&]<typename Y>(Y) {
    dispatch(dx.scalar_type(), [&]<typename X>(X) {
      std::array<const Y*, kBackbones> in{};
      for (int b = 0; b < d.backbones; b++) in[b] = dys[b].const_data_ptr<Y>();
      backward<Y, X>(d, in, dx.mutable_data_ptr<X>());
    });
  });
}

}  // namespace gdd_fast::cpu
