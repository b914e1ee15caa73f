// The bits of ReLUs on the CPU. Comparing and masking run on whole vectors over a buffer of one byte per element;
// packing and unpacking that buffer costs one multiplication per eight elements. For float32, AVX2 has an instruction
// for it: eight comparisons make a byte.
#include "relu_bits.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <string>
#include <type_traits>

#include "cpu/simd.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define GDD_FAST_MOVEMASK __attribute__((target("avx2")))
#endif

namespace gdd_fast::cpu {
namespace {

constexpr int64_t kRun = 2048;  // elements whose bytes and values stay in the first-level cache
constexpr int64_t kGrain = 16;  // runs below which a second thread does not pay off
using Bytes = std::array<uint8_t, kRun>;

// Eight bytes of 0 or 1 to eight bits, the first byte lowest, and back.
inline uint8_t pack(uint64_t bytes) { return static_cast<uint8_t>(bytes * 0x0102040810204080u >> 56); }
inline uint64_t unpack(uint8_t bits) { return bits * uint64_t{0x0101010101010101u} & 0x8040201008040201u; }

// The type in which a value is compared.
template <typename T>
using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
inline void clamp_loop(T* y, uint8_t* blocked, int64_t n, float ceiling) {
  for (int64_t i = 0; i < n; i++) {
    const auto value = static_cast<Real<T>>(y[i]);
    const bool low = value <= 0, high = value >= ceiling;  // both false for NaN
    blocked[i] = low | high;
    y[i] = low ? T(0) : high ? T(ceiling) : y[i];
  }
}

template <typename T>
inline void floor_loop(T* y, uint8_t* blocked, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    const bool low = static_cast<Real<T>>(y[i]) <= 0;
    blocked[i] = low;
    y[i] = low ? T(0) : y[i];
  }
}

template <typename T>
inline void mask_loop(const T* dy, const uint8_t* blocked, T* dx, int64_t n) {
  for (int64_t i = 0; i < n; i++) dx[i] = blocked[i] ? T(0) : dy[i];
}

// target_clones takes no templates, hence one function per type; masking needs only a value's size
#define GDD_FAST_CLAMP(T)                                                                                            \
  GDD_FAST_SIMD void clamp(T* y, uint8_t* blocked, int64_t n, float ceiling) { clamp_loop(y, blocked, n, ceiling); } \
  GDD_FAST_SIMD void clamp(T* y, uint8_t* blocked, int64_t n) { floor_loop(y, blocked, n); }
GDD_FAST_CLAMP(float)
GDD_FAST_CLAMP(double)
GDD_FAST_CLAMP(at::BFloat16)
GDD_FAST_CLAMP(at::Half)
#undef GDD_FAST_CLAMP

#define GDD_FAST_MASK(T) \
  GDD_FAST_SIMD void mask(const T* dy, const uint8_t* blocked, T* dx, int64_t n) { mask_loop(dy, blocked, dx, n); }
GDD_FAST_MASK(uint16_t)
GDD_FAST_MASK(uint32_t)
GDD_FAST_MASK(uint64_t)
#undef GDD_FAST_MASK

#ifdef GDD_FAST_MOVEMASK
// Whether this processor has AVX2, as torch sees it (ATEN_CPU_CAPABILITY).
bool has_movemask() {
  static const bool has = at::get_cpu_capability() == "AVX2" || at::get_cpu_capability() == "AVX512";
  return has;
}

// `bytes` whole bytes of bits, and their eight values each.
GDD_FAST_MOVEMASK void clamp_bytes(float* y, uint8_t* bits, int64_t bytes, float ceiling) {
  const __m256 zero = _mm256_setzero_ps(), top = _mm256_set1_ps(ceiling);
  const bool capped = !std::isinf(ceiling);
  for (int64_t i = 0; i < bytes; i++, y += 8) {
    __m256 value = _mm256_loadu_ps(y), flat = _mm256_cmp_ps(value, zero, _CMP_LE_OQ);  // false for NaN
    value = _mm256_andnot_ps(flat, value);
    if (capped) {
      const __m256 high = _mm256_cmp_ps(value, top, _CMP_GE_OQ);
      value = _mm256_blendv_ps(value, top, high);
      flat = _mm256_or_ps(flat, high);
    }
    _mm256_storeu_ps(y, value);
    bits[i] = static_cast<uint8_t>(_mm256_movemask_ps(flat));
  }
}

GDD_FAST_MOVEMASK void mask_bytes(const float* dy, const uint8_t* bits, float* dx, int64_t bytes) {
  const __m256i pick = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  for (int64_t i = 0; i < bytes; i++, dy += 8, dx += 8) {
    const __m256i chosen = _mm256_and_si256(_mm256_set1_epi32(bits[i]), pick);
    const __m256 blocked = _mm256_castsi256_ps(_mm256_cmpeq_epi32(chosen, pick));
    _mm256_storeu_ps(dx, _mm256_andnot_ps(blocked, _mm256_loadu_ps(dy)));
  }
}
#endif

// body(first element, count, first byte) for every run
template <typename Body>
void for_runs(int64_t size, const Body& body) {
  at::parallel_for(0, (size + kRun - 1) / kRun, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; run++) {
      const int64_t first = run * kRun;
      body(first, std::min(kRun, size - first), first / 8);
    }
  });
}

}  // namespace

void relu_bits_(at::Tensor& y, double ceiling, at::Tensor& bits) {
  uint8_t* out = bits.mutable_data_ptr<uint8_t>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, y.scalar_type(), "relu_bits_", [&] {
    scalar_t* values = y.mutable_data_ptr<scalar_t>();
    for_runs(y.numel(), [&](int64_t first, int64_t count, int64_t byte) {
#ifdef GDD_FAST_MOVEMASK
      if (y.scalar_type() == at::kFloat && has_movemask() && count % 8 == 0) {
        auto* floats = reinterpret_cast<float*>(values + first);  // T is float here, but this compiles for every T
        return clamp_bytes(floats, out + byte, count / 8, static_cast<float>(ceiling));
      }
#endif
      Bytes blocked;
      if (std::isinf(ceiling)) {
        clamp(values + first, blocked.data(), count);
      } else {
        clamp(values + first, blocked.data(), count, static_cast<float>(ceiling));
      }
      std::fill(blocked.begin() + count, blocked.begin() + std::min((count + 7) / 8 * 8, kRun), 0);
      for (int64_t i = 0; i < count; i += 8) {
        uint64_t word;
        std::memcpy(&word, blocked.data() + i, 8);
        out[byte + i / 8] = pack(word);
      }
    });
  });
}

template <typename Word>
static void mask_words(const at::Tensor& dy, const uint8_t* bits, at::Tensor& dx) {
  const auto* from = static_cast<const Word*>(dy.const_data_ptr());
  auto* to = static_cast<Word*>(dx.mutable_data_ptr());
  for_runs(dy.numel(), [&](int64_t first, int64_t count, int64_t byte) {
#ifdef GDD_FAST_MOVEMASK
    if (dy.scalar_type() == at::kFloat && has_movemask() && count % 8 == 0) {
      return mask_bytes(dy.const_data_ptr<float>() + first, bits + byte, dx.mutable_data_ptr<float>() + first,
                        count / 8);
    }
#endif
    Bytes blocked;
    for (int64_t i = 0; i < count; i += 8) {
      const uint64_t word = unpack(bits[byte + i / 8]);
      std::memcpy(blocked.data() + i, &word, 8);
    }
    mask(from + first, blocked.data(), to + first, count);
  });
}

void mask_bits(const at::Tensor& dy, const at::Tensor& bits, at::Tensor& dx) {
  const uint8_t* in = bits.const_data_ptr<uint8_t>();
  switch (dy.element_size()) {
    case 2:
      return mask_words<uint16_t>(dy, in, dx);
    case 4:
      return mask_words<uint32_t>(dy, in, dx);
    default:
      return mask_words<uint64_t>(dy, in, dx);
  }
}

}  // namespace gdd_fast::cpu
