// The backward of group_norm_silu on the CPU, for channels_last maps. The SiLU's input is recomputed from x and the
// statistics; its gradient dt is kept, one image at a time, while three sums per channel are taken: of u, of dt and of
// dt * u, where u is the distance from the group's mean. All gradients follow from these and
//
//     dx = dt * a + u * b + d    with a, b and d constant per channel
//
// Images run in parallel. Sums are in float32 over short runs and in float64 over runs.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <vector>

#include "cpu/floats.h"
#include "cpu/silu.h"
#include "cpu/simd.h"
#include "group_norm_silu.h"

namespace gdd_fast::cpu {
namespace {

constexpr int64_t kRun = 16;  // pixels summed in float32

// dt, and sums of u, dt and dt * u, over pixels of `count` neighbouring channels; steps are from pixel to pixel.
template <bool Silu, typename T>
GDD_FAST_INLINE void first_pass(const T* dy, int64_t dy_step, const T* x, int64_t x_step, float* dt, int64_t dt_step,
                                int64_t pixels, int64_t count, const float* centre, const float* factor,
                                const float* offset, float limit, float* sum_u, float* sum_dt, float* sum_both) {
  for (int64_t p = 0; p < pixels; p++, dy += dy_step, x += x_step, dt += dt_step) {
#pragma GCC ivdep
    for (int64_t c = 0; c < count; c++) {
      const float u = widen(x[c]) - centre[c];
      float gradient = widen(dy[c]);
      if (Silu) gradient *= silu_slope(u * factor[c] + offset[c], limit);
      dt[c] = gradient;
      sum_u[c] += u;
      sum_dt[c] += gradient;
      sum_both[c] += gradient * u;
    }
  }
}

template <typename T>
GDD_FAST_INLINE void second_pass(const float* dt, int64_t dt_step, const T* x, int64_t x_step, T* dx, int64_t pixels,
                                 int64_t count, const float* centre, const float* a, const float* b, const float* d) {
  for (int64_t p = 0; p < pixels; p++, dt += dt_step, x += x_step, dx += count) {
#pragma GCC ivdep
    for (int64_t c = 0; c < count; c++) dx[c] = narrow<T>(dt[c] * a[c] + ((widen(x[c]) - centre[c]) * b[c] + d[c]));
  }
}

// target_clones takes no templates, hence one overload per type
#define GDD_FAST_PASSES(T)                                                                                             \
  GDD_FAST_SIMD void differentiate(const T* dy, int64_t dy_step, const T* x, int64_t x_step, float* dt,                \
                                   int64_t dt_step, int64_t pixels, int64_t count, const float* centre,                \
                                   const float* factor, const float* offset, bool silu, float limit, float* sum_u,     \
                                   float* sum_dt, float* sum_both) {                                                   \
    silu ? first_pass<true>(dy, dy_step, x, x_step, dt, dt_step, pixels, count, centre, factor, offset, limit, sum_u,  \
                            sum_dt, sum_both)                                                                          \
         : first_pass<false>(dy, dy_step, x, x_step, dt, dt_step, pixels, count, centre, factor, offset, limit, sum_u, \
                             sum_dt, sum_both);                                                                        \
  }                                                                                                                    \
  GDD_FAST_SIMD void combine(const float* dt, int64_t dt_step, const T* x, int64_t x_step, T* dx, int64_t pixels,      \
                             int64_t count, const float* centre, const float* a, const float* b, const float* d) {     \
    second_pass(dt, dt_step, x, x_step, dx, pixels, count, centre, a, b, d);                                           \
  }
GDD_FAST_PASSES(float)
GDD_FAST_PASSES(at::BFloat16)
GDD_FAST_PASSES(at::Half)
#undef GDD_FAST_PASSES

template <typename T>
struct Maps {
  const T *dy, *x, *skip;
  T *dx, *dskip;
};

// `rows` are this image's gradients of weight, bias, add, scale and shift.
template <typename T>
void one_image(const GroupNormSilu& g, const NormMap& dy_map, const NormMap& x_map, const NormMap& skip_map,
               const Maps<T>& maps, int64_t image, const float* mean, const float* rstd,
               const std::array<float*, 5>& rows) {
  const auto row = [image](const NormRows& r) { return r.data == nullptr ? nullptr : r.data + image * r.stride; };
  const float *add = row(g.add), *scale = row(g.scale), *shift = row(g.shift);
  const int64_t width = g.channels / g.groups, channels = g.channels;
  std::vector<float> centre(channels), factor(channels), offset(channels), a(channels), b(channels), d(channels);
  for (int64_t c = 0; c < channels; c++) {
    const double outer = scale == nullptr ? 1.0 : 1.0 + scale[c];
    centre[c] = float(double(mean[c / width]) - (add == nullptr ? 0.0 : double(add[c])));
    factor[c] = float(double(rstd[c / width]) * g.weight[c] * outer);
    offset[c] = float(g.bias[c] * outer + (shift == nullptr ? 0.0 : shift[c]));
  }
  // body(the map, its channels, its first channel, its gradient) for x and, if given, skip
  const auto each = [&](const auto& body) {
    body(maps.x + image * x_map.image, x_map, 0, maps.dx + image * g.pixels * x_map.channels);
    if (skip_map.channels > 0) {
      body(maps.skip + image * skip_map.image, skip_map, x_map.channels,
           maps.dskip + image * g.pixels * skip_map.channels);
    }
  };

  std::vector<float> dt(channels * g.pixels), partial(3 * channels);
  std::vector<double> total(3 * channels, 0.0);
  const T* dy = maps.dy + image * dy_map.image;
  for (int64_t from = 0; from < g.pixels; from += kRun) {
    const int64_t count = std::min(kRun, g.pixels - from);
    std::fill(partial.begin(), partial.end(), 0.0f);
    each([&](const T* x, const NormMap& map, int64_t first, T*) {
      differentiate(dy + from * dy_map.pixel + first, dy_map.pixel, x + from * map.pixel, map.pixel,
                    dt.data() + from * channels + first, channels, count, map.channels, centre.data() + first,
                    factor.data() + first, offset.data() + first, g.silu, kLimit, partial.data() + first,
                    partial.data() + channels + first, partial.data() + 2 * channels + first);
    });
    for (int64_t i = 0; i < 3 * channels; i++) total[i] += partial[i];
  }

  const double *sum_u = total.data(), *sum_dt = sum_u + channels, *sum_both = sum_dt + channels;
  const double size = double(width * g.pixels);
  for (int64_t group = 0; group < g.groups; group++) {
    const double r = rstd[group];
    double mean_dxhat = 0, mean_both = 0;
    for (int64_t c = group * width; c < (group + 1) * width; c++) {
      const double outer = scale == nullptr ? 1.0 : 1.0 + scale[c], k = g.weight[c] * outer;
      mean_dxhat += k * sum_dt[c] / size;
      mean_both += k * r * sum_both[c] / size;
    }
    for (int64_t c = group * width; c < (group + 1) * width; c++) {
      const double outer = scale == nullptr ? 1.0 : 1.0 + scale[c], k = g.weight[c] * outer;
      const double by_dt = r * k, by_u = -r * r * mean_both, constant = -r * mean_dxhat;
      a[c] = float(by_dt);
      b[c] = float(by_u);
      d[c] = float(constant);
      rows[0][c] = float(outer * r * sum_both[c]);
      rows[1][c] = float(outer * sum_dt[c]);
      rows[2][c] = float(by_dt * sum_dt[c] + by_u * sum_u[c] + constant * double(g.pixels));
      rows[3][c] = float(g.weight[c] * r * sum_both[c] + g.bias[c] * sum_dt[c]);
      rows[4][c] = float(sum_dt[c]);
    }
  }
  each([&](const T* x, const NormMap& map, int64_t first, T* dx) {
    combine(dt.data() + first, channels, x, map.pixel, dx, g.pixels, map.channels, centre.data() + first,
            a.data() + first, b.data() + first, d.data() + first);
  });
}

}  // namespace

void group_norm_silu_backward(const GroupNormSilu& g, const NormMap& dy, const NormMap& x, const NormMap& skip,
                              const at::Tensor& mean, const at::Tensor& rstd, at::Tensor& dx, at::Tensor& dskip,
                              const std::vector<at::Tensor>& rows) {
  const float *means = mean.const_data_ptr<float>(), *rstds = rstd.const_data_ptr<float>();
  const auto run = [&]<typename T>(T* dx_data) {
    const Maps<T> maps{dy.map.const_data_ptr<T>(), x.map.const_data_ptr<T>(), skip.map.const_data_ptr<T>(), dx_data,
                       dskip.mutable_data_ptr<T>()};
    at::parallel_for(0, g.images, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        std::array<float*, 5> out;
        for (size_t k = 0; k < 5; k++) out[k] = rows[k].mutable_data_ptr<float>() + i * g.channels;
        one_image(g, dy, x, skip, maps, i, means + i * g.groups, rstds + i * g.groups, out);
      }
    });
  };
  AT_DISPATCH_SWITCH(dx.scalar_type(), "group_norm_silu_backward",
                     AT_DISPATCH_CASE(at::kFloat, [&] { run(dx.mutable_data_ptr<scalar_t>()); })
                         AT_DISPATCH_CASE(at::kBFloat16, [&] { run(dx.mutable_data_ptr<scalar_t>()); })
                             AT_DISPATCH_CASE(at::kHalf, [&] { run(dx.mutable_data_ptr<scalar_t>()); }));
}

}  // namespace gdd_fast::cpu
