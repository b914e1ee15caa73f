// The bits of ReLUs on the CPU. Comparing and masking run on whole vectors over a buffer of one byte per element;
// packing and unpacking that buffer costs one multiplication per eight elements.
#include "relu_bits.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/simd.h"

namespace gdd_fast::cpu {
namespace {

constexpr int64_t kRun = 2048;  // elements whose bytes and values stay in the first-level cache
constexpr int64_t kGrain = 16;  // runs below which a second thread does not pay
using Bytes = std::array<uint8_t, kRun>;

// Eight bytes of 0 or 1 to eight bits, the first byte lowest; and back.
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

// target_clones takes no templates, hence one function per type; masking knows only a value's size
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
