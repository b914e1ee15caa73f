// Attention over few tokens: keys and values of a head are packed into panels, and both products are computed like
// those of a panel convolution, with a softmax between them while the logits are in the cache.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/panels.h"
#include "cpu/silu.h"
#include "cpu/simd.h"
#include "small_maps.h"

namespace gdd_fast::cpu {
namespace {

// Logits, not yet scaled -> exponentials in place; returns the factor that makes them probabilities.
GDD_FAST_SIMD float exponentials(float* x, int64_t count, float scale, float limit) {
  float largest = x[0], lanes[16] = {}, sum = 0;
  for (int64_t i = 1; i < count; i++) largest = x[i] > largest ? x[i] : largest;
  const int64_t whole = count / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) {
    for (int64_t j = 0; j < 16; j++) {
      x[i + j] = exponential((x[i + j] - largest) * scale, limit);
      lanes[j] += x[i + j];
    }
  }
  for (int64_t i = whole; i < count; i++) {
    x[i] = exponential((x[i] - largest) * scale, limit);
    sum += x[i];
  }
  for (const float lane : lanes) sum += lane;
  return 1 / sum;
}

#define GDD_FAST_LOOPS(T)                                                                                              \
  GDD_FAST_SIMD void widen_all(const T* from, float* to, int64_t count) {                                              \
    for (int64_t i = 0; i < count; i++) to[i] = widen(from[i]);                                                        \
  }                                                                                                                    \
  GDD_FAST_SIMD void scaled(const float* from, float factor, T* to, int64_t count) {                                   \
    for (int64_t i = 0; i < count; i++) to[i] = narrow<T>(from[i] * factor);                                           \
  }                                                                                                                    \
  /* rows (count, width), `step` apart -> panels of their transpose; what a last panel has more stays as it is */      \
  GDD_FAST_SIMD void transposed(const T* from, int64_t step, int64_t count, int64_t width, float* to, int64_t panel) { \
    for (int64_t i = 0; i < count; i++) {                                                                              \
      float* column = to + i / panel * panel * width + i % panel;                                                      \
      for (int64_t k = 0; k < width; k++) column[k * panel] = widen(from[i * step + k]);                               \
    }                                                                                                                  \
  }
GDD_FAST_LOOPS(float)
GDD_FAST_LOOPS(at::BFloat16)
#undef GDD_FAST_LOOPS

int64_t up_to(int64_t count, int64_t step) { return (count + step - 1) / step; }

// One head of one image: q, k and v of its tokens, `step` apart; y likewise, `y_step`.
template <typename T>
void head(const SmallAttention& a, const T* q, const T* k, const T* v, int64_t step, T* y, int64_t y_step) {
  const Panels& kernels = panels();
  const int64_t width = kernels.width, tokens = a.tokens, dim = a.head_dim;
  const int64_t key_panels = up_to(tokens, width), value_panels = up_to(dim, width);
  std::vector<float> keys(key_panels * width * dim), values(value_panels * width * tokens), queries(tokens * dim);
  std::vector<float> logits(kMostRows * key_panels * width);
  transposed(k, step, tokens, dim, keys.data(), width);
  for (int64_t i = 0; i < tokens; i++) {
    widen_all(q + i * step, queries.data() + i * dim, dim);
    for (int64_t p = 0; p < value_panels; p++) {
      widen_all(v + i * step + p * width, values.data() + (p * tokens + i) * width, std::min(width, dim - p * width));
    }
  }
  const float scale = 1 / std::sqrt(float(dim));
  float sums[kMostRows * kWidestPanel], factors[kMostRows];
  for (int64_t from = 0; from < tokens; from += kernels.rows) {
    const int64_t rows = std::min(kernels.rows, tokens - from);
    Tap tap;
    for (int64_t r = 0; r < rows; r++) tap.rows[r] = queries.data() + (from + r) * dim;
    tap.depth = dim;
    for (int64_t p = 0; p < key_panels; p++) {
      tap.weight = keys.data() + p * width * dim;
      kernels.multiply(rows, &tap, 1, sums);
      for (int64_t r = 0; r < rows; r++) {
        std::copy_n(sums + r * width, width, logits.data() + (r * key_panels + p) * width);
      }
    }
    for (int64_t r = 0; r < rows; r++) {
      float* row = logits.data() + r * key_panels * width;
      factors[r] = exponentials(row, tokens, scale, kLimit);
      tap.rows[r] = row;
    }
    tap.depth = tokens;
    for (int64_t p = 0; p < value_panels; p++) {
      tap.weight = values.data() + p * width * tokens;
      kernels.multiply(rows, &tap, 1, sums);
      for (int64_t r = 0; r < rows; r++) {
        scaled(sums + r * width, factors[r], y + (from + r) * y_step + p * width, std::min(width, dim - p * width));
      }
    }
  }
}

}  // namespace

void small_attention(const SmallAttention& a, const at::Tensor& qkv, at::Tensor& y) {
  const int64_t channels = a.heads * a.head_dim;
  const auto run = [&]<typename T>(const T* from, T* to) {
    at::parallel_for(0, a.images * a.heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t image = i / a.heads, at = i % a.heads * a.head_dim;
        const T* first = from + image * a.tokens * 3 * channels + at;
        head(a, first, first + channels, first + 2 * channels, 3 * channels, to + image * a.tokens * channels + at,
             channels);
      }
    });
  };
  if (y.scalar_type() == at::kBFloat16) {
    run(qkv.const_data_ptr<at::BFloat16>(), y.mutable_data_ptr<at::BFloat16>());
  } else {
    run(qkv.const_data_ptr<float>(), y.mutable_data_ptr<float>());
  }
}

}  // namespace gdd_fast::cpu
