// max_pool2x2 on the CPU, parallel over rows of the output. If channels are innermost, vectors hold channels, and the
// four places of a window are compared at once; a contiguous image counts as one with one channel, and vectors hold
// neighbouring columns.
#include "max_pool2x2.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/floats.h"
#include "cpu/simd.h"

namespace gdd_fast::cpu {
namespace {

constexpr int64_t kGrain = 32768;  // values read below which a second thread does not pay off
constexpr int64_t kLine = 64;      // bytes per cache line
constexpr int64_t kAhead = 2048;   // bytes of each of the two rows

// The first of equal values; NaN wins. Places are as wide as the compared values, so that their vectors match.
template <typename T>
GDD_FAST_INLINE void largest(const T& a, const T& b, const T& c, const T& d, T& y, uint8_t& place) {
  using Place = std::conditional_t<std::is_same_v<T, double>, int64_t, int32_t>;
  Real<T> best = widen(a);
  Place where = 0;
  const Real<T> others[3] = {widen(b), widen(c), widen(d)};
  for (int i = 0; i < 3; i++) {
    const bool larger = (others[i] > best) | (others[i] != others[i]);
    best = larger ? others[i] : best;
    where = larger ? Place(i + 1) : where;
  }
  y = narrow<T>(best);
  place = static_cast<uint8_t>(where);
}

// Prefetches `count` values from `ahead` bytes after `data` on. Rows are visited alternately, a few hundred bytes at a
// time, which the processor's prefetchers do not follow.
template <int kWrite, typename T>
GDD_FAST_INLINE void fetch(const T* data, int64_t count, int64_t ahead = kAhead) {
  for (int64_t i = 0; i < count; i += kLine / sizeof(T)) __builtin_prefetch(data + ahead / sizeof(T) + i, kWrite);
}

// One row of windows, from the two input rows `top` and `bottom`.
template <typename T>
GDD_FAST_INLINE void pool_row(const T* top, const T* bottom, T* y, uint8_t* places, int64_t columns, int64_t channels) {
  if (channels == 1) {
#pragma GCC ivdep
    for (int64_t i = 0; i < columns; i++) {
      largest(top[2 * i], top[2 * i + 1], bottom[2 * i], bottom[2 * i + 1], y[i], places[i]);
    }
    return;
  }
  for (int64_t column = 0; column < columns; column++) {
    const T *a = top + column * 2 * channels, *c = bottom + column * 2 * channels;
    T* out = y + column * channels;
    uint8_t* place = places + column * channels;
    fetch<0>(a, 2 * channels);
    fetch<0>(c, 2 * channels);
    fetch<1>(out, channels, kAhead / 2);
    fetch<1>(place, channels, kAhead / 2 / sizeof(T));
#pragma GCC ivdep
    for (int64_t i = 0; i < channels; i++) largest(a[i], a[channels + i], c[i], c[channels + i], out[i], place[i]);
  }
}

// The gradients of two input rows. Values are only moved, so only the size of their type matters.
template <typename Word>
GDD_FAST_INLINE void spread_row(const Word* dy, const uint8_t* places, Word* top, Word* bottom, int64_t columns,
                                int64_t channels) {
  if (channels == 1) {
#pragma GCC ivdep
    for (int64_t i = 0; i < columns; i++) {
      const Word value = dy[i], place = places[i];
      top[2 * i] = place == 0 ? value : Word(0);
      top[2 * i + 1] = place == 1 ? value : Word(0);
      bottom[2 * i] = place == 2 ? value : Word(0);
      bottom[2 * i + 1] = place == 3 ? value : Word(0);
    }
    return;
  }
  for (int64_t column = 0; column < columns; column++) {
    const Word* in = dy + column * channels;
    const uint8_t* from = places + column * channels;
    Word *a = top + column * 2 * channels, *c = bottom + column * 2 * channels;
    fetch<1>(a, 2 * channels);
    fetch<1>(c, 2 * channels);
#pragma GCC ivdep
    for (int64_t i = 0; i < channels; i++) {
      const Word value = in[i], place = from[i];
      a[i] = place == 0 ? value : Word(0);
      a[channels + i] = place == 1 ? value : Word(0);
      c[i] = place == 2 ? value : Word(0);
      c[channels + i] = place == 3 ? value : Word(0);
    }
  }
}

// target_clones takes no templates, hence one overload per type
#define GDD_FAST_POOL(T)                                                                                             \
  GDD_FAST_SIMD void pool(const T* top, const T* bottom, T* y, uint8_t* places, int64_t columns, int64_t channels) { \
    pool_row(top, bottom, y, places, columns, channels);                                                             \
  }
GDD_FAST_POOL(float)
GDD_FAST_POOL(double)
GDD_FAST_POOL(at::BFloat16)
GDD_FAST_POOL(at::Half)
#undef GDD_FAST_POOL

#define GDD_FAST_SPREAD(Word)                                                                                \
  GDD_FAST_SIMD void spread(const Word* dy, const uint8_t* places, Word* top, Word* bottom, int64_t columns, \
                            int64_t channels) {                                                              \
    spread_row(dy, places, top, bottom, columns, channels);                                                  \
  }
GDD_FAST_SPREAD(uint16_t)
GDD_FAST_SPREAD(uint32_t)
GDD_FAST_SPREAD(uint64_t)
#undef GDD_FAST_SPREAD

// body(offset of the upper of two rows of the larger image, offset of their row in the smaller one, columns of that)
template <typename Body>
void for_rows(const PoolSize& s, const Body& body) {
  const int64_t rows = s.height / 2, columns = s.width / 2, line = s.width * s.channels;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, 4 * columns * s.channels));
  at::parallel_for(0, s.images * rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      body((row / rows * s.height + row % rows * 2) * line, row * columns * s.channels, columns);
    }
  });
}

template <typename Word>
void spread_words(const at::Tensor& dy, const uint8_t* places, const PoolSize& s, at::Tensor& dx) {
  const auto* in = static_cast<const Word*>(dy.const_data_ptr());
  auto* out = static_cast<Word*>(dx.mutable_data_ptr());
  const int64_t line = s.width * s.channels;
  for_rows(s, [&](int64_t to, int64_t from, int64_t columns) {
    spread(in + from, places + from, out + to, out + to + line, columns, s.channels);
  });
}

}  // namespace

void max_pool2x2(const at::Tensor& x, const PoolSize& s, at::Tensor& y, at::Tensor& places) {
  uint8_t* place = places.mutable_data_ptr<uint8_t>();
  const int64_t line = s.width * s.channels;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "max_pool2x2", [&] {
    const scalar_t* in = x.const_data_ptr<scalar_t>();
    scalar_t* out = y.mutable_data_ptr<scalar_t>();
    for_rows(s, [&](int64_t from, int64_t to, int64_t columns) {
      pool(in + from, in + from + line, out + to, place + to, columns, s.channels);
    });
  });
}

void max_pool2x2_backward(const at::Tensor& dy, const at::Tensor& places, const PoolSize& s, at::Tensor& dx) {
  const uint8_t* place = places.const_data_ptr<uint8_t>();
  switch (dy.element_size()) {
    case 2:
      return spread_words<uint16_t>(dy, place, s, dx);
    case 4:
      return spread_words<uint32_t>(dy, place, s, dx);
    default:
      return spread_words<uint64_t>(dy, place, s, dx);
  }
}

}  // namespace gdd_fast::cpu
