// The inner loops of winograd_conv2d for one instruction set; winograd_conv2d.cpp includes this by cpu/vector_sets.h.

using Vector = GDD_FAST_VECTOR;
constexpr int64_t kVector = sizeof(Vector) / sizeof(float);
constexpr int64_t kPanel = 2 * kVector;            // output channels computed at once
constexpr int64_t kRows = GDD_FAST_EITHER(14, 6);  // of a product kept in registers, two vectors each

#define GDD_FAST_STEP GDD_FAST_ISA GDD_FAST_INLINE

GDD_FAST_STEP Vector constant(float value) { return GDD_FAST_MM(set1_ps)(value); }
GDD_FAST_STEP Vector add(Vector a, Vector b) { return GDD_FAST_MM(add_ps)(a, b); }
GDD_FAST_STEP Vector subtract(Vector a, Vector b) { return GDD_FAST_MM(sub_ps)(a, b); }
GDD_FAST_STEP Vector multiply(Vector a, float b) { return GDD_FAST_MM(mul_ps)(a, constant(b)); }
GDD_FAST_STEP Vector fma(Vector a, float b, Vector c) { return GDD_FAST_MM(fmadd_ps)(a, constant(b), c); }

GDD_FAST_STEP Vector load(const float* from) { return GDD_FAST_MM(loadu_ps)(from); }
GDD_FAST_STEP void store(float* to, Vector v) { GDD_FAST_MM(storeu_ps)(to, v); }

GDD_FAST_STEP Vector load(const at::BFloat16* from) {
  Vector v;
  auto* values = reinterpret_cast<float*>(&v);
  for (int64_t i = 0; i < kVector; i++) values[i] = widen(from[i]);
  return v;
}

GDD_FAST_STEP void store(at::BFloat16* to, Vector v) {
  const auto* values = reinterpret_cast<const float*>(&v);
  for (int64_t i = 0; i < kVector; i++) to[i] = narrow<at::BFloat16>(values[i]);
}

// Three values of a weight, `step` apart -> its values at the six points, divided by the points' Lagrange factors.
GDD_FAST_STEP void weight_to_points(const Vector* w, int64_t step, Vector* g) {
  constexpr double a = kA, b = kB, at_a = 1 / (2 * a * a * (a * a - b * b)), at_b = 1 / (2 * b * b * (b * b - a * a));
  const Vector w0 = w[0], w1 = w[step], w2 = w[2 * step];
  g[0] = multiply(w0, float(1 / (a * a * b * b)));
  Vector even = fma(w2, float(a * a * at_a), multiply(w0, float(at_a))), odd = multiply(w1, float(a * at_a));
  g[1] = add(even, odd);
  g[2] = subtract(even, odd);
  even = fma(w2, float(b * b * at_b), multiply(w0, float(at_b))), odd = multiply(w1, float(b * at_b));
  g[3] = add(even, odd);
  g[4] = subtract(even, odd);
  g[5] = w2;
}

// The 3x3 kernels of kPanel output channels, `out_step` apart, with values at `taps` -> 36 rows of `points`.
GDD_FAST_ISA void transform_weight(const float* w, int64_t out_step, const int64_t* taps, float* points,
                                   int64_t stride) {
  alignas(sizeof(Vector)) float values[9][kPanel];
  for (int64_t i = 0; i < 9; i++) {
    for (int64_t o = 0; o < kPanel; o++) values[i][o] = w[o * out_step + taps[i]];
  }
  for (int64_t o = 0; o < kPanel; o += kVector) {
    Vector rows[9], columns[18], row[6];
    for (int i = 0; i < 9; i++) rows[i] = load(values[i] + o);
    for (int x = 0; x < 3; x++) {
      weight_to_points(rows + x, 3, row);
      for (int i = 0; i < 6; i++) columns[3 * i + x] = row[i];
    }
    for (int i = 0; i < 6; i++) {
      weight_to_points(columns + 3 * i, 1, row);
      for (int j = 0; j < 6; j++) store(points + (6 * i + j) * stride + o, row[j]);
    }
  }
}

// Six values of the image, `step` apart -> their values at the six points.
GDD_FAST_STEP void to_points(const Vector* d, int64_t step, Vector* t) {
  const Vector d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step];
  t[0] = fma(d[0], kA2 * kB2, fma(d2, -(kA2 + kB2), d4));
  t[5] = fma(d1, kA2 * kB2, fma(d3, -(kA2 + kB2), d[5 * step]));
  Vector even = fma(d2, -kB2, d4), odd = multiply(fma(d1, -kB2, d3), kA);
  t[1] = add(even, odd);
  t[2] = subtract(even, odd);
  even = fma(d2, -kA2, d4), odd = multiply(fma(d1, -kA2, d3), kB);
  t[3] = add(even, odd);
  t[4] = subtract(even, odd);
}

// Products at the six points, `step` apart -> four values of the result.
GDD_FAST_STEP void from_points(const Vector* m, int64_t step, Vector* y) {
  const Vector sum_a = add(m[step], m[2 * step]), difference_a = subtract(m[step], m[2 * step]);
  const Vector sum_b = add(m[3 * step], m[4 * step]), difference_b = subtract(m[3 * step], m[4 * step]);
  y[0] = add(m[0], add(sum_a, sum_b));
  y[1] = fma(difference_a, kA, multiply(difference_b, kB));
  y[2] = fma(sum_a, kA2, multiply(sum_b, kB2));
  y[3] = fma(difference_a, kA * kA2, fma(difference_b, kB * kB2, m[5 * step]));
}

// One tile's 6x6 pixels at `pixels`, of `channels` each -> 36 rows of `points`, `stride` apart.
template <typename T>
GDD_FAST_ISA void transform_tile(const T* const* pixels, int64_t channels, float* points, int64_t stride) {
  for (int64_t c = 0; c < channels; c += kVector) {
    Vector d[36], t[36];
    for (int i = 0; i < 36; i++) d[i] = load(pixels[i] + c);
    for (int x = 0; x < 6; x++) {
      Vector column[6];
      to_points(d + x, 6, column);
      for (int i = 0; i < 6; i++) t[6 * i + x] = column[i];
    }
    for (int i = 0; i < 6; i++) {
      Vector row[6];
      to_points(t + 6 * i, 1, row);
      for (int j = 0; j < 6; j++) store(points + (6 * i + j) * stride + c, row[j]);
    }
  }
}

// 36 rows of products, `stride` apart, and the bias -> the first `rows` x `columns` of the tile's 4x4 pixels.
template <typename T>
GDD_FAST_ISA void finish_tile(const float* products, int64_t stride, const float* bias, T* result, int64_t line,
                              int64_t channels, int64_t rows, int64_t columns) {
  for (int64_t c = 0; c < channels; c += kVector) {
    Vector t[24];
    for (int j = 0; j < 6; j++) {
      Vector m[6], column[4];
      for (int i = 0; i < 6; i++) m[i] = load(products + (6 * i + j) * stride + c);
      from_points(m, 1, column);
      for (int i = 0; i < 4; i++) t[6 * i + j] = column[i];
    }
    const Vector offset = bias == nullptr ? constant(0) : load(bias + c);
    for (int64_t i = 0; i < rows; i++) {
      Vector y[4];
      from_points(t + 6 * i, 1, y);
      for (int64_t j = 0; j < columns; j++) store(result + i * line + j * channels + c, add(y[j], offset));
    }
  }
}

// y[r, 0:kPanel] = sum over k of x[r, k] * w[k, 0:kPanel]; meanwhile it prefetches the panel after w.
template <int64_t Rows>
GDD_FAST_ISA void multiply_rows(const float* x, int64_t x_stride, const float* w, int64_t depth, float* y,
                                int64_t y_stride) {
  Vector sums[Rows][2];
#pragma GCC unroll 16
  for (int64_t r = 0; r < Rows; r++) {
    sums[r][0] = sums[r][1] = constant(0);
    __builtin_prefetch(y + r * y_stride, 1);
    if constexpr (kPanel > 16) __builtin_prefetch(y + r * y_stride + 16, 1);
  }
  for (int64_t k = 0; k < depth; k++, w += kPanel) {
    const Vector w0 = load(w), w1 = load(w + kVector);
    __builtin_prefetch(w + depth * kPanel);
    if constexpr (kPanel > 16) __builtin_prefetch(w + depth * kPanel + 16);
#pragma GCC unroll 16
    for (int64_t r = 0; r < Rows; r++) {
      const Vector value = constant(x[r * x_stride + k]);
      sums[r][0] = GDD_FAST_MM(fmadd_ps)(value, w0, sums[r][0]);
      sums[r][1] = GDD_FAST_MM(fmadd_ps)(value, w1, sums[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int64_t r = 0; r < Rows; r++) {
    store(y + r * y_stride, sums[r][0]);
    store(y + r * y_stride + kVector, sums[r][1]);
  }
}

// All `rows` of a panel, in runs of equal length except one.
template <int64_t Rows = kRows>
GDD_FAST_ISA void multiply_run(int64_t rows, const float* x, int64_t x_stride, const float* w, int64_t depth, float* y,
                               int64_t y_stride) {
  if constexpr (Rows > 0) {
    if (rows == Rows) {
      multiply_rows<Rows>(x, x_stride, w, depth, y, y_stride);
    } else {
      multiply_run<Rows - 1>(rows, x, x_stride, w, depth, y, y_stride);
    }
  }
}

GDD_FAST_ISA void multiply_panel(int64_t rows, const float* x, int64_t x_stride, const float* w, int64_t depth,
                                 float* y, int64_t y_stride) {
  const int64_t runs = (rows + kRows - 1) / kRows;
  for (int64_t run = 0, from = 0; run < runs; run++) {
    const int64_t to = rows * (run + 1) / runs;
    multiply_run(to - from, x + from * x_stride, x_stride, w, depth, y + from * y_stride, y_stride);
    from = to;
  }
}

#undef GDD_FAST_STEP
