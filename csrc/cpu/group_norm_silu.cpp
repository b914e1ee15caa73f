// group_norm_silu on the CPU. An image is read twice: for two sums per channel, and for the result. Images run in
// parallel or, if they are fewer than threads, parts of an image. Sums are in float32 over short runs and in float64
// over runs, in an order that does not depend on the threads.
#include "group_norm_silu.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "cpu/floats.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define GDD_FAST_SETS
#include <immintrin.h>
#endif

namespace gdd_fast::cpu {
namespace {

constexpr int64_t kRun = 64;       // pixels summed in float32
constexpr int64_t kRowRun = 256;   // the same if they are contiguous
constexpr int64_t kGrain = 32768;  // values below which a second thread does not pay off

#ifdef GDD_FAST_SETS
namespace avx512 {
#define GDD_FAST_ISA __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define GDD_FAST_WIDTH 16
#define GDD_FAST_FMA(a, b, c) Vector(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)))
#define GDD_FAST_WIDENED(h) Vector(_mm512_maskz_cvtph_ps(0xffff, __m256i(h)))
#define GDD_FAST_NARROWED(v) Halves(_mm512_maskz_cvtps_ph(0xffff, __m512(v), _MM_FROUND_TO_NEAREST_INT))
#define GDD_FAST_PACKED(bits) Halves(_mm512_maskz_cvtepi32_epi16(0xffff, __m512i(bits)))
#define GDD_FAST_SCALE
#define GDD_FAST_UNPACKED(h) Bits(_mm512_maskz_cvtepu16_epi32(0xffff, __m256i(h)))
#include "cpu/group_norm_kernels.h"
#undef GDD_FAST_ISA
#undef GDD_FAST_WIDTH
#undef GDD_FAST_FMA
#undef GDD_FAST_WIDENED
#undef GDD_FAST_NARROWED
#undef GDD_FAST_UNPACKED
#undef GDD_FAST_PACKED
#undef GDD_FAST_SCALE
}  // namespace avx512

namespace avx2 {
#define GDD_FAST_ISA __attribute__((target("avx2,fma,f16c")))
#define GDD_FAST_WIDTH 8
#define GDD_FAST_FMA(a, b, c) Vector(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)))
#define GDD_FAST_WIDENED(h) Vector(_mm256_cvtph_ps(__m128i(h)))
#define GDD_FAST_NARROWED(v) Halves(_mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT))
#define GDD_FAST_PACKED(bits) \
  Halves(_mm_packus_epi32(_mm256_castsi256_si128(__m256i(bits)), _mm256_extracti128_si256(__m256i(bits), 1)))
#define GDD_FAST_UNPACKED(h) Bits(_mm256_cvtepu16_epi32(__m128i(h)))
#include "cpu/group_norm_kernels.h"
#undef GDD_FAST_ISA
#undef GDD_FAST_WIDTH
#undef GDD_FAST_FMA
#undef GDD_FAST_WIDENED
#undef GDD_FAST_NARROWED
#undef GDD_FAST_UNPACKED
#undef GDD_FAST_PACKED
}  // namespace avx2
#endif

namespace any {
#define GDD_FAST_ISA
#define GDD_FAST_WIDTH 4
#define GDD_FAST_FMA(a, b, c) ((a) * (b) + (c))
#define GDD_FAST_PACKED(bits) __builtin_convertvector(bits, Halves)
#define GDD_FAST_UNPACKED(h) __builtin_convertvector(h, Bits)
#include "cpu/group_norm_kernels.h"
#undef GDD_FAST_ISA
#undef GDD_FAST_WIDTH
#undef GDD_FAST_FMA
#undef GDD_FAST_UNPACKED
#undef GDD_FAST_PACKED
}  // namespace any

// The loops for T of one instruction set; pairs are without and with SiLU.
template <typename T>
struct Loops {
  void (*moments)(const T*, int64_t, int64_t, int64_t, float*, float*);
  void (*merge)(const T*, double, int64_t, const float*, const float*, double*, double*);
  void (*row_sums)(const T*, int64_t, double*, double*);
  void (*normalise[2])(const T*, T*, int64_t, int64_t, int64_t, int64_t, const float*, const float*, const float*);
  void (*normalise_row[2])(const T*, T*, int64_t, float, float, float);
};

// The loops for this processor, as torch sees it (ATEN_CPU_CAPABILITY).
template <typename T>
Loops<T> loops() {
#define GDD_FAST_LOOPS(set)                                                                                \
  {                                                                                                        \
    set::moments<T>, set::merge<T>, set::row_sums<T>, {set::normalise<false, T>, set::normalise<true, T>}, \
        {set::normalise_row<false, T>, set::normalise_row<true, T>},                                       \
  }
#ifdef GDD_FAST_SETS
  const std::string processor = at::get_cpu_capability();
  if (processor == "AVX512") return GDD_FAST_LOOPS(avx512);
  if (processor == "AVX2") return GDD_FAST_LOOPS(avx2);
#endif
  return GDD_FAST_LOOPS(any);
#undef GDD_FAST_LOOPS
}

// Parallel over parts [0, n) of an image; serial if images already run in parallel.
template <typename Body>
void for_parts(int64_t n, int64_t values, const Body& body) {
  at::parallel_for(0, n, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, values / n)), body);
}

// Two concatenated maps; `each` calls body(data, map, index of the map's first channel) for each map.
template <typename T>
struct Maps {
  const T *x, *skip;
  const NormMap &x_map, &skip_map;
  Loops<T> loops;

  template <typename Body>
  void each(int64_t image, const Body& body) const {
    body(x + image * x_map.image, x_map, 0);
    if (skip_map.channels > 0) body(skip + image * skip_map.image, skip_map, x_map.channels);
  }
};

// Adds each channel's sum, and sum of squares, over the pixels to totals that are 0 before.
template <typename T>
void channel_sums(const GroupNormSilu& g, const Maps<T>& maps, int64_t image, double* total, double* squares) {
  const int64_t values = g.channels * g.pixels;
  if (g.channels_last) {
    const int64_t runs = (g.pixels + kRun - 1) / kRun;
    std::vector<float> partial(2 * runs * g.channels);
    const auto in_run = [&](int64_t run, const auto& body) {
      const int64_t from = run * kRun, count = std::min(kRun, g.pixels - from);
      float* sums = partial.data() + 2 * run * g.channels;
      maps.each(image, [&](const T* in, const NormMap& map, int64_t first) {
        body(in + from * map.pixel, map, count, sums + first, sums + g.channels + first, first);
      });
    };
    for_parts(runs, values, [&](int64_t begin, int64_t end) {
      for (int64_t run = begin; run < end; run++) {
        in_run(run, [&](const T* in, const NormMap& map, int64_t count, float* sum, float* squared, int64_t) {
          maps.loops.moments(in, count, map.pixel, map.channels, sum, squared);
        });
      }
    });
    for (int64_t run = 0; run < runs; run++) {
      in_run(run, [&](const T* in, const NormMap& map, int64_t count, float* sum, float* squared, int64_t first) {
        maps.loops.merge(in, double(count), map.channels, sum, squared, total + first, squares + first);
      });
    }
    return;
  }
  maps.each(image, [&](const T* in, const NormMap& map, int64_t first) {
    for_parts(map.channels, values, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; c++) {
        maps.loops.row_sums(in + c * map.channel, g.pixels, total + first + c, squares + first + c);
      }
    });
  });
}

// `mean` and `rstd` may be null.
template <typename T>
void one_image(const GroupNormSilu& g, const Maps<T>& maps, int64_t image, T* y, float* mean, float* rstd) {
  const auto row = [image](const NormRows& rows) {
    return rows.data == nullptr ? nullptr : rows.data + image * rows.stride;
  };
  const float *add = row(g.add), *scale = row(g.scale), *shift = row(g.shift);
  const int64_t width = g.channels / g.groups;
  std::vector<double> sums(2 * g.channels);
  std::vector<float> constants(3 * g.channels);
  double *total = sums.data(), *squares = total + g.channels;
  float *centre = constants.data(), *factor = centre + g.channels, *offset = factor + g.channels;

  channel_sums<T>(g, maps, image, total, squares);
  const double pixels = double(g.pixels), size = double(width) * pixels;
  for (int64_t group = 0; group < g.groups; group++) {
    const int64_t begin = group * width, end = begin + width;
    double sum = 0, square = 0;
    for (int64_t c = begin; c < end; c++) {
      const double a = add == nullptr ? 0.0 : add[c];
      sum += total[c] + pixels * a;
      square += squares[c] + a * (2 * total[c] + pixels * a);
    }
    const double middle = sum / size, variance = std::max(square / size - middle * middle, 0.0);  // or NaN
    const double reciprocal = 1 / std::sqrt(variance + g.eps);
    if (mean != nullptr) mean[group] = float(middle);
    if (rstd != nullptr) rstd[group] = float(reciprocal);
    for (int64_t c = begin; c < end; c++) {
      const double outer = scale == nullptr ? 1.0 : 1.0 + scale[c];
      centre[c] = float(middle - (add == nullptr ? 0.0 : double(add[c])));
      factor[c] = float(reciprocal * g.weight[c] * outer);
      offset[c] = float(g.bias[c] * outer + (shift == nullptr ? 0.0 : shift[c]));
    }
  }

  const int64_t values = g.channels * g.pixels;
  const auto normalise = maps.loops.normalise[g.silu];
  const auto normalise_row = maps.loops.normalise_row[g.silu];
  T* out = y + image * values;
  if (g.channels_last) {
    for_parts(g.pixels, values, [&](int64_t begin, int64_t end) {
      maps.each(image, [&](const T* in, const NormMap& map, int64_t first) {
        normalise(in + begin * map.pixel, out + begin * g.channels + first, end - begin, map.pixel, g.channels,
                  map.channels, centre + first, factor + first, offset + first);
      });
    });
    return;
  }
  maps.each(image, [&](const T* in, const NormMap& map, int64_t first) {
    for_parts(map.channels, values, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; c++) {
        const int64_t k = first + c;
        normalise_row(in + c * map.channel, out + k * g.pixels, g.pixels, centre[k], factor[k], offset[k]);
      }
    });
  });
}

}  // namespace

void group_norm_silu(const GroupNormSilu& g, const NormMap& x, const NormMap& skip, at::Tensor& y, float* mean,
                     float* rstd) {
  const int64_t values = g.channels * g.pixels;
  // fewer images than threads: each is split instead
  const int64_t grain = g.images >= at::get_num_threads() ? std::max<int64_t>(1, kGrain / values) : g.images;
  const auto run = [&]<typename T>(T* out) {
    static const Loops<T> loops = cpu::loops<T>();
    const Maps<T> maps{x.map.const_data_ptr<T>(), skip.map.const_data_ptr<T>(), x, skip, loops};
    const auto at = [&](float* statistics, int64_t i) {
      return statistics == nullptr ? nullptr : statistics + i * g.groups;
    };
    at::parallel_for(0, g.images, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) one_image(g, maps, i, out, at(mean, i), at(rstd, i));
    });
  };
  AT_DISPATCH_SWITCH(y.scalar_type(), "group_norm_silu",
                     AT_DISPATCH_CASE(at::kFloat, [&] { run(y.mutable_data_ptr<scalar_t>()); })
                         AT_DISPATCH_CASE(at::kBFloat16, [&] { run(y.mutable_data_ptr<scalar_t>()); })
                             AT_DISPATCH_CASE(at::kHalf, [&] { run(y.mutable_data_ptr<scalar_t>()); }));
}

}  // namespace gdd_fast::cpu
