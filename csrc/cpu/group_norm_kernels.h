// The inner loops of group_norm_silu's forward for one instruction set. group_norm_silu.cpp includes this once per set,
// each in its own namespace, with these macros:
//
//   GDD_FAST_ISA            the attribute of every function here
//   GDD_FAST_WIDTH          values in a vector
//   GDD_FAST_FMA(a, b, c)   a * b + c of vectors
//   GDD_FAST_WIDENED(h)     a vector of float16 as float32, GDD_FAST_NARROWED(v) back, where there are instructions
//   GDD_FAST_UNPACKED(h)    a vector of numbers below 2^16 as Bits, GDD_FAST_PACKED(bits) back as Halves
//   GDD_FAST_SCALE          defined for AVX-512, which has instructions for the two ends of an exponential
//
// Vectors are the compiler's vector types, so that the loops need no intrinsics that a set lacks.

constexpr int64_t kVector = GDD_FAST_WIDTH;
typedef float Vector __attribute__((vector_size(4 * GDD_FAST_WIDTH)));
typedef uint32_t Bits __attribute__((vector_size(4 * GDD_FAST_WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * GDD_FAST_WIDTH)));

#define GDD_FAST_STEP GDD_FAST_ISA GDD_FAST_INLINE

GDD_FAST_STEP Vector constant(float value) { return Vector{} + value; }

#ifdef GDD_FAST_WIDENED
GDD_FAST_STEP Vector widened(Halves h) { return GDD_FAST_WIDENED(h); }
GDD_FAST_STEP Halves narrowed(Vector v) { return GDD_FAST_NARROWED(v); }
#else
// Like `widen` and `narrow` of cpu/floats.h, which GCC does not vectorise here.
GDD_FAST_STEP Vector widened(Halves h) {
  const Bits bits = __builtin_convertvector(h, Bits), magnitude = bits & 0x7fff, sign = (bits & 0x8000) << 16;
  const Bits normal = ((magnitude << 13) + (112u << 23)) | (Bits(magnitude >= 0x7c00) & 0x7f800000);
  const Bits subnormal = Bits(Vector(magnitude | bits_of(0.5f)) - 0.5f), small = Bits(magnitude < 0x400);
  return Vector((small & subnormal) | (~small & normal) | sign);
}

GDD_FAST_STEP Halves narrowed(Vector v) {
  const Bits bits = Bits(v), magnitude = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
  const Bits exponent = bits & 0x7f800000, least = Bits{} + (113u << 23);
  const Vector power = Vector((exponent > least ? exponent : least) + (15u << 23));
  const Bits sum = Bits(power + Vector(magnitude) * 0x1p112f * 0x1p-110f);
  const Bits half = ((sum >> 13) & 0x7c00) + (sum & 0xfff), nan = Bits(magnitude > 0x7f800000);
  return __builtin_convertvector(sign | (half & ~nan) | (0x7e00 & nan), Halves);
}
#endif

// The first `count` values at `from`, by default kVector.
template <typename T>
GDD_FAST_STEP Vector load(const T* from, int64_t count = kVector) {
  if constexpr (std::is_same_v<T, float>) {
    Vector v{};
    std::memcpy(&v, from, 4 * count);
    return v;
  } else {
    Halves halves{};
    std::memcpy(&halves, from, 2 * count);
    if constexpr (std::is_same_v<T, c10::Half>) return widened(halves);
    return Vector(GDD_FAST_UNPACKED(halves) << 16);
  }
}

template <typename T>
GDD_FAST_STEP void store(T* to, Vector v, int64_t count = kVector) {
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(to, &v, 4 * count);
  } else {
    Halves halves;
    if constexpr (std::is_same_v<T, c10::Half>) {
      halves = narrowed(v);
    } else {
      const Bits bits = Bits(v), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
      halves = GDD_FAST_PACKED(v == v ? rounded : Bits{} + 0x7fc0);
    }
    std::memcpy(to, &halves, 2 * count);
  }
}

// x / (1 + exp(-x)). exp(-x) is 2^k times a polynomial in the rest f of -x / ln 2 = k + f, |f| <= 1/2, with an error of
// 9e-8. If it overflows, the quotient is -0, and for minus infinity NaN, as in PyTorch.
GDD_FAST_STEP Vector silu_of(Vector x) {
  Vector t = x * -1.44269504f;
#ifdef GDD_FAST_SCALE
  const Vector f = Vector(_mm512_maskz_reduce_ps(0xffff, __m512(t), 0));
#else
  // at these limits the powers of two are 0 and infinity
  t = t < -127.0f ? constant(-127.0f) : t;
  t = t > 128.0f ? constant(128.0f) : t;
  const Vector shifted = t + 12582912.0f;  // 1.5 * 2^23: rounds to the nearest whole number
  const Vector f = t - (shifted - 12582912.0f);
#endif
  Vector p = GDD_FAST_FMA(constant(1.3264727e-3f), f, constant(9.671513e-3f));
  p = GDD_FAST_FMA(p, f, constant(5.5507336e-2f));
  p = GDD_FAST_FMA(p, f, constant(2.4022242e-1f));
  p = GDD_FAST_FMA(p, f, constant(6.93147e-1f));
  p = GDD_FAST_FMA(p, f, constant(1.0f));
#ifdef GDD_FAST_SCALE
  return x / (Vector(_mm512_maskz_scalef_ps(0xffff, __m512(p), __m512(t - f))) + 1.0f);
#else
  return x / (p * Vector((Bits(shifted) - (0x4b400000u - 127u)) << 23) + 1.0f);
#endif
}

// For up to Blocks * kVector channels, the sums over `pixels` pixels, `step` apart, of distances from the first pixel
// and of their squares. However far values are from 0, or the first from the others, subtracting the mean from the
// squares loses at most a factor of `pixels` in accuracy.
template <int Blocks, typename T>
GDD_FAST_STEP void moments_of(const T* x, int64_t pixels, int64_t step, int64_t count, float* sum, float* squares) {
  const int64_t width = Blocks == 1 ? count : kVector;
  Vector first[Blocks], sums[Blocks] = {}, squared[Blocks] = {};
  for (int b = 0; b < Blocks; b++) first[b] = load(x + b * kVector, width);
  for (int64_t p = 1; p < pixels; p++) {
    x += step;
    for (int b = 0; b < Blocks; b++) {
      const Vector distance = load(x + b * kVector, width) - first[b];
      sums[b] += distance;
      squared[b] = GDD_FAST_FMA(distance, distance, squared[b]);
    }
  }
  for (int b = 0; b < Blocks; b++) {
    store(sum + b * kVector, sums[b], width);
    store(squares + b * kVector, squared[b], width);
  }
}

// The same for `count` channels.
template <typename T>
GDD_FAST_ISA void moments(const T* x, int64_t pixels, int64_t step, int64_t count, float* sum, float* squares) {
  int64_t c = 0;
  for (; c + 4 * kVector <= count; c += 4 * kVector) moments_of<4>(x + c, pixels, step, kVector, sum + c, squares + c);
  for (; c + kVector <= count; c += kVector) moments_of<1>(x + c, pixels, step, kVector, sum + c, squares + c);
  if (c < count) moments_of<1>(x + c, pixels, step, count - c, sum + c, squares + c);
}

// Adds the sums of `pixels` pixels, given by their `moments`, to each channel's sum and sum of squares, in float64.
template <typename T>
GDD_FAST_ISA void merge(const T* first, double pixels, int64_t count, const float* sum, const float* squares,
                        double* total, double* total_squares) {
  for (int64_t c = 0; c < count; c++) {
    const double from = widen(first[c]), distances = sum[c];
    total[c] += pixels * from + distances;
    total_squares[c] += squares[c] + from * (2 * distances + pixels * from);
  }
}

GDD_FAST_STEP float sum_of(Vector v) {
  float values[kVector];
  std::memcpy(values, &v, sizeof v);
#pragma GCC unroll 4
  for (int64_t half = kVector / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < half; i++) values[i] += values[i + half];
  }
  return values[0];
}

// Adds to a channel's sum and sum of squares those of its contiguous pixels, in runs as in `moments`.
template <typename T>
GDD_FAST_ISA void row_sums(const T* x, int64_t pixels, double* total, double* total_squares) {
  constexpr int64_t blocks = 4;
  while (pixels > 0) {
    const int64_t count = std::min(kRowRun, pixels);
    const float first = widen(*x);
    Vector sums[blocks] = {}, squared[blocks] = {};
    int64_t i = 0;
    for (; i + blocks * kVector <= count; i += blocks * kVector) {
      for (int b = 0; b < blocks; b++) {
        const Vector distance = load(x + i + b * kVector) - first;
        sums[b] += distance;
        squared[b] = GDD_FAST_FMA(distance, distance, squared[b]);
      }
    }
    for (; i + kVector <= count; i += kVector) {
      const Vector distance = load(x + i) - first;
      sums[0] += distance;
      squared[0] = GDD_FAST_FMA(distance, distance, squared[0]);
    }
    float sum = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
    float squares = sum_of((squared[0] + squared[1]) + (squared[2] + squared[3]));
    for (; i < count; i++) {
      const float distance = widen(x[i]) - first;
      sum += distance;
      squares += distance * distance;
    }
    merge(x, double(count), 1, &sum, &squares, total, total_squares);
    x += count;
    pixels -= count;
  }
}

template <bool Silu>
GDD_FAST_STEP Vector normalised(Vector x, Vector centre, Vector factor, Vector offset) {
  const Vector t = GDD_FAST_FMA(x - centre, factor, offset);
  return Silu ? silu_of(t) : t;
}

// y = act((x - centre) * factor + offset); NaN stays NaN.
template <bool Silu, typename T>
GDD_FAST_ISA void normalise(const T* x, T* y, int64_t pixels, int64_t step_x, int64_t step_y, int64_t count,
                            const float* centre, const float* factor, const float* offset) {
  const int64_t whole = count / kVector * kVector, rest = count - whole;
  for (int64_t p = 0; p < pixels; p++, x += step_x, y += step_y) {
    for (int64_t c = 0; c < whole; c += kVector) {
      store(y + c, normalised<Silu>(load(x + c), load(centre + c), load(factor + c), load(offset + c)));
    }
    if (rest > 0) {
      store(y + whole,
            normalised<Silu>(load(x + whole, rest), load(centre + whole, rest), load(factor + whole, rest),
                             load(offset + whole, rest)),
            rest);
    }
  }
}

// The same for one channel with contiguous pixels.
template <bool Silu, typename T>
GDD_FAST_ISA void normalise_row(const T* x, T* y, int64_t pixels, float centre, float factor, float offset) {
  const Vector c = constant(centre), f = constant(factor), o = constant(offset);
  const int64_t whole = pixels / kVector * kVector, rest = pixels - whole;
  for (int64_t p = 0; p < whole; p += kVector) store(y + p, normalised<Silu>(load(x + p), c, f, o));
  if (rest > 0) store(y + whole, normalised<Silu>(load(x + whole, rest), c, f, o), rest);
}

#undef GDD_FAST_STEP
