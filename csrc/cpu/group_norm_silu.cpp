// group_norm_silu on the CPU. An image is read three times, while it is in the cache: for the sum of each channel, for
// the sum of its squared distances from the group's mean, and for the result. Images run in parallel, or, if there are
// fewer than threads, parts of one. Sums are over short runs in float32 and over these in float64, in an order that
// does not depend on the threads.
#include "group_norm_silu.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/floats.h"
#include "cpu/silu.h"
#include "cpu/simd.h"

namespace gdd_fast::cpu {
namespace {

constexpr int64_t kRun = 64;      // values summed in float32
constexpr int64_t kLanes = 16;    // sums side by side, where pixels are innermost
constexpr int64_t kGrain = 8192;  // values below which a second thread does not pay

// sum[c] += x[p, c], or its squared distance from centre[c], over `pixels` pixels of `count` neighbouring values each.
template <bool Squares, typename T>
GDD_FAST_INLINE void accumulate(const T* x, int64_t pixels, int64_t step, int64_t count, const float* centre,
                                float* sum) {
  for (int64_t p = 0; p < pixels; p++, x += step) {
#pragma GCC ivdep
    for (int64_t c = 0; c < count; c++) {
      const float value = Squares ? widen(x[c]) - centre[c] : widen(x[c]);
      sum[c] += Squares ? value * value : value;
    }
  }
}

// y = act((x - centre) * factor + offset); NaN stays NaN.
template <typename T>
GDD_FAST_INLINE void normalise(const T* x, T* y, int64_t count, const float* centre, const float* factor,
                               const float* offset, bool silu, float limit) {
  if (silu) {
#pragma GCC ivdep
    for (int64_t c = 0; c < count; c++) {
      y[c] = narrow<T>(silu_of((widen(x[c]) - centre[c]) * factor[c] + offset[c], limit));
    }
  } else {
#pragma GCC ivdep
    for (int64_t c = 0; c < count; c++) y[c] = narrow<T>((widen(x[c]) - centre[c]) * factor[c] + offset[c]);
  }
}

// target_clones takes no templates, hence one overload per type
#define GDD_FAST_LOOPS(T)                                                                                             \
  GDD_FAST_SIMD void sums(const T* x, int64_t pixels, int64_t step, int64_t count, const float* centre, float* sum) { \
    centre == nullptr ? accumulate<false>(x, pixels, step, count, centre, sum)                                        \
                      : accumulate<true>(x, pixels, step, count, centre, sum);                                        \
  }                                                                                                                   \
  GDD_FAST_SIMD void pixels_of(const T* x, T* y, int64_t pixels, int64_t step_x, int64_t step_y, int64_t count,       \
                               const float* centre, const float* factor, const float* offset, bool silu,              \
                               float limit) {                                                                         \
    for (int64_t p = 0; p < pixels; p++) {                                                                            \
      normalise(x + p * step_x, y + p * step_y, count, centre, factor, offset, silu, limit);                          \
    }                                                                                                                 \
  }

GDD_FAST_LOOPS(float)
GDD_FAST_LOOPS(at::BFloat16)
GDD_FAST_LOOPS(at::Half)
#undef GDD_FAST_LOOPS

// Parallel over [0, n) parts of an image; serial where images already run in parallel.
template <typename Body>
void for_parts(int64_t n, int64_t values, const Body& body) {
  at::parallel_for(0, n, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, values / n)), body);
}

// Two maps whose channels follow one another, and what to do with the channels [first, first + count) of each.
template <typename T>
struct Maps {
  const T *x, *skip;
  const NormMap &x_map, &skip_map;

  template <typename Body>
  void each(int64_t image, const Body& body) const {
    body(x + image * x_map.image, x_map, 0);
    if (skip_map.channels > 0) body(skip + image * skip_map.image, skip_map, x_map.channels);
  }
};

// total[c] = the sum over the pixels of channel c, or with `centre` of squared distances from centre[c].
template <typename T>
void channel_sums(const GroupNormSilu& g, const Maps<T>& maps, int64_t image, const float* centre, double* total) {
  const int64_t runs = (g.pixels + kRun - 1) / kRun, values = g.channels * g.pixels;
  if (g.channels_last) {
    std::vector<float> partial(runs * g.channels, 0.0f);
    for_parts(runs, values, [&](int64_t begin, int64_t end) {
      for (int64_t run = begin; run < end; run++) {
        const int64_t from = run * kRun, count = std::min(kRun, g.pixels - from);
        maps.each(image, [&](const T* in, const NormMap& map, int64_t first) {
          sums(in + from * map.pixel, count, map.pixel, map.channels, centre == nullptr ? nullptr : centre + first,
               partial.data() + run * g.channels + first);
        });
      }
    });
    std::fill(total, total + g.channels, 0.0);
    for (int64_t run = 0; run < runs; run++) {
      for (int64_t c = 0; c < g.channels; c++) total[c] += partial[run * g.channels + c];
    }
    return;
  }
  maps.each(image, [&](const T* in, const NormMap& map, int64_t first) {
    for_parts(map.channels, values, [&](int64_t begin, int64_t end) {
      float centres[kLanes];
      for (int64_t c = begin; c < end; c++) {
        if (centre != nullptr) std::fill(centres, centres + kLanes, centre[first + c]);
        const float* middle = centre == nullptr ? nullptr : centres;
        double sum = 0;
        for (int64_t from = 0; from < g.pixels; from += kRun * kLanes) {
          float lanes[kLanes] = {};
          const T* row = in + c * map.channel + from;
          const int64_t count = std::min(kRun * kLanes, g.pixels - from), whole = count / kLanes;
          sums(row, whole, kLanes, kLanes, middle, lanes);
          sums(row + whole * kLanes, 1, 0, count % kLanes, middle, lanes);
          for (const float lane : lanes) sum += lane;
        }
        total[first + c] = sum;
      }
    });
  });
}

template <typename T>
void one_image(const GroupNormSilu& g, const Maps<T>& maps, int64_t image, T* y, float* mean, float* rstd) {
  const auto row = [image](const NormRows& rows) {
    return rows.data == nullptr ? nullptr : rows.data + image * rows.stride;
  };
  const float *add = row(g.add), *scale = row(g.scale), *shift = row(g.shift);
  const int64_t width = g.channels / g.groups;
  std::vector<double> total(g.channels);
  std::vector<float> centre(g.channels), factor(g.channels), offset(g.channels);

  channel_sums<T>(g, maps, image, nullptr, total.data());
  for (int64_t group = 0; group < g.groups; group++) {
    double sum = 0;
    for (int64_t c = group * width; c < (group + 1) * width; c++) {
      sum += total[c] + (add == nullptr ? 0.0 : double(g.pixels) * add[c]);
    }
    const double middle = sum / double(width * g.pixels);
    mean[group] = float(middle);
    for (int64_t c = group * width; c < (group + 1) * width; c++) {
      centre[c] = float(middle - (add == nullptr ? 0.0 : double(add[c])));
    }
  }
  channel_sums<T>(g, maps, image, centre.data(), total.data());
  for (int64_t group = 0; group < g.groups; group++) {
    double sum = 0;
    for (int64_t c = group * width; c < (group + 1) * width; c++) sum += total[c];
    const double reciprocal = 1 / std::sqrt(sum / double(width * g.pixels) + g.eps);
    rstd[group] = float(reciprocal);
    for (int64_t c = group * width; c < (group + 1) * width; c++) {
      const double outer = scale == nullptr ? 1.0 : 1.0 + scale[c];
      factor[c] = float(reciprocal * g.weight[c] * outer);
      offset[c] = float(g.bias[c] * outer + (shift == nullptr ? 0.0 : shift[c]));
    }
  }

  const int64_t values = g.channels * g.pixels;
  T* out = y + image * values;
  if (g.channels_last) {
    for_parts(g.pixels, values, [&](int64_t begin, int64_t end) {
      maps.each(image, [&](const T* in, const NormMap& map, int64_t first) {
        pixels_of(in + begin * map.pixel, out + begin * g.channels + first, end - begin, map.pixel, g.channels,
                  map.channels, centre.data() + first, factor.data() + first, offset.data() + first, g.silu, kLimit);
      });
    });
    return;
  }
  maps.each(image, [&](const T* in, const NormMap& map, int64_t first) {
    for_parts(map.channels, values, [&](int64_t begin, int64_t end) {
      float centres[kLanes], factors[kLanes], offsets[kLanes];
      for (int64_t c = begin; c < end; c++) {
        std::fill(centres, centres + kLanes, centre[first + c]);
        std::fill(factors, factors + kLanes, factor[first + c]);
        std::fill(offsets, offsets + kLanes, offset[first + c]);
        const T* from = in + c * map.channel;
        T* to = out + (first + c) * g.pixels;
        const int64_t whole = g.pixels / kLanes, done = whole * kLanes;
        pixels_of(from, to, whole, kLanes, kLanes, kLanes, centres, factors, offsets, g.silu, kLimit);
        pixels_of(from + done, to + done, 1, 0, 0, g.pixels - done, centres, factors, offsets, g.silu, kLimit);
      }
    });
  });
}

}  // namespace

void group_norm_silu(const GroupNormSilu& g, const NormMap& x, const NormMap& skip, at::Tensor& y, at::Tensor& mean,
                     at::Tensor& rstd) {
  float *means = mean.mutable_data_ptr<float>(), *rstds = rstd.mutable_data_ptr<float>();
  // fewer images than threads: each is split instead
  const int64_t grain = g.images >= at::get_num_threads() ? 1 : g.images;
  const auto run = [&]<typename T>(T* out) {
    const Maps<T> maps{x.map.const_data_ptr<T>(), skip.map.const_data_ptr<T>(), x, skip};
    at::parallel_for(0, g.images, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) one_image(g, maps, i, out, means + i * g.groups, rstds + i * g.groups);
    });
  };
  AT_DISPATCH_SWITCH(y.scalar_type(), "group_norm_silu",
                     AT_DISPATCH_CASE(at::kFloat, [&] { run(y.mutable_data_ptr<scalar_t>()); })
                         AT_DISPATCH_CASE(at::kBFloat16, [&] { run(y.mutable_data_ptr<scalar_t>()); })
                             AT_DISPATCH_CASE(at::kHalf, [&] { run(y.mutable_data_ptr<scalar_t>()); }));
}

}  // namespace gdd_fast::cpu
