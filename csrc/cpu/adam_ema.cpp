// adam_ema_ on the CPU: the gradients are checked once, then everything is updated chunk by chunk in the cache.
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "adam_ema_launchers.h"
#include "cpu/floats.h"
#include "cpu/simd.h"

namespace gdd_fast::cpu {
namespace {

constexpr int64_t kChunk = 16384;  // numbers; up to five arrays of this size stay in the second-level cache

struct Chunk {
  size_t tensor, group;
  int64_t first, count;
};

std::vector<Chunk> chunks_of(at::TensorList tensors, at::ArrayRef<AdamGroup> groups) {
  std::vector<Chunk> chunks;
  size_t k = 0;
  for (size_t group = 0; group < groups.size(); group++) {
    for (const size_t end = k + groups[group].tensors; k < end; k++) {
      for (int64_t first = 0; first < tensors[k].numel(); first += kChunk) {
        chunks.push_back({k, group, first, std::min(kChunk, tensors[k].numel() - first)});
      }
    }
  }
  return chunks;
}

// Factors of one step of a group, computed in double as in torch.optim.Adam, then rounded once.
struct Factors {
  float step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, root_correction, eps, weight_decay, average_weight;

  Factors(const AdamGroup& o, double t, double lr, double weight)
      : step_size(static_cast<float>(lr / (1 - std::pow(o.beta1, t)))),
        beta1(static_cast<float>(o.beta1)),
        one_minus_beta1(static_cast<float>(1 - o.beta1)),
        beta2(static_cast<float>(o.beta2)),
        one_minus_beta2(static_cast<float>(1 - o.beta2)),
        root_correction(static_cast<float>(1 / std::sqrt(1 - std::pow(o.beta2, t)))),
        eps(static_cast<float>(o.eps)),
        weight_decay(static_cast<float>(o.weight_decay)),
        average_weight(static_cast<float>(weight)) {}
};

GDD_FAST_SIMD bool finite(const float* x, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; i++) {
    const uint32_t bits = bits_of(x[i]) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  return largest < 0x7f800000;
}

// torch.lerp starts from the nearer end. kEnd: all the way, so the old value need not be read; kNone: not at all.
// kGradient: all the way to the unchanged gradient, which is copied outside the loop.
enum Lerp { kNone, kNear, kFar, kEnd, kGradient };

Lerp lerp_by(float weight) { return weight == 1 ? kEnd : weight < 0.5f ? kNear : kFar; }

template <Lerp By>
GDD_FAST_INLINE float lerp(const float* from, int64_t i, float to, float weight, float rest) {
  if constexpr (By == kEnd || By == kGradient) return to;
  return By == kNear ? from[i] + weight * (to - from[i]) : to - (to - from[i]) * rest;
}

template <Lerp First, Lerp Average>
GDD_FAST_INLINE void update_loop(const Factors& f, float* p, const float* grad, float* m, float* v, float* a,
                                 int64_t n) {
  const Factors by = f;  // a copy, out of reach of the stores
  const float average_rest = 1 - by.average_weight;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) {
    const float g = grad[i] + by.weight_decay * p[i];
    const float first = lerp<First>(m, i, g, by.one_minus_beta1, by.beta1);
    const float second = v[i] * by.beta2 + by.one_minus_beta2 * g * g;
    const float q = p[i] - by.step_size * (first / (std::sqrt(second) * by.root_correction + by.eps));
    if constexpr (First != kGradient) m[i] = first;
    v[i] = second;
    p[i] = q;
    if constexpr (Average != kNone) a[i] = lerp<Average>(a, i, q, by.average_weight, average_rest);
  }
}

template <Lerp First>
GDD_FAST_INLINE void update_switch(const Factors& f, float* p, const float* g, float* m, float* v, float* a,
                                   int64_t n) {
  switch (a ? lerp_by(f.average_weight) : kNone) {
    case kNone:
      return update_loop<First, kNone>(f, p, g, m, v, a, n);
    case kNear:
      return update_loop<First, kNear>(f, p, g, m, v, a, n);
    case kFar:
      return update_loop<First, kFar>(f, p, g, m, v, a, n);
    default:
      return update_loop<First, kEnd>(f, p, g, m, v, a, n);
  }
}

// Stores past the cache if the processor can: nothing reads the first moment before the next step, and a store to the
// cache would first read what it overwrites.
void stream(float* to, const float* from, int64_t n) {
  int64_t i = 0;
#ifdef __SSE2__
  for (; i < n && reinterpret_cast<uintptr_t>(to + i) % 16; i++) to[i] = from[i];
  for (; i + 4 <= n; i += 4) _mm_stream_ps(to + i, _mm_loadu_ps(from + i));
  _mm_sfence();
#endif
  for (; i < n; i++) to[i] = from[i];
}

GDD_FAST_SIMD void update(const Factors& f, float* p, const float* g, float* m, float* v, float* a, int64_t n) {
  switch (lerp_by(f.one_minus_beta1)) {
    case kNear:
      return update_switch<kNear>(f, p, g, m, v, a, n);
    case kFar:
      return update_switch<kFar>(f, p, g, m, v, a, n);
    default:
      if (f.weight_decay != 0) return update_switch<kEnd>(f, p, g, m, v, a, n);
      update_switch<kGradient>(f, p, g, m, v, a, n);
      return stream(m, g, n);
  }
}

}  // namespace

void adam_ema_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
               at::TensorList averages, at::Tensor& step, at::Tensor& skipped, const at::Tensor& lr,
               const at::Tensor& average_weight, at::ArrayRef<AdamGroup> groups) {
  const std::vector<Chunk> chunks = chunks_of(params, groups);
  const int64_t count = static_cast<int64_t>(chunks.size());
  std::atomic<bool> all_finite = true;
  at::parallel_for(0, count, 2, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end && all_finite.load(std::memory_order_relaxed); k++) {
      const Chunk& c = chunks[k];
      if (!finite(grads[c.tensor].const_data_ptr<float>() + c.first, c.count)) all_finite = false;
    }
  });
  if (!all_finite) {
    *skipped.mutable_data_ptr<int64_t>() += 1;
    return;
  }
  const double t = *step.mutable_data_ptr<float>() += 1;
  std::vector<Factors> factors;
  for (size_t g = 0; g < groups.size(); g++) {
    factors.emplace_back(groups[g], t, lr.const_data_ptr<double>()[g], *average_weight.const_data_ptr<double>());
  }
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; k++) {
      const Chunk& c = chunks[k];
      const auto at = [&](at::TensorList tensors) {
        return tensors.empty() ? nullptr : tensors[c.tensor].mutable_data_ptr<float>() + c.first;
      };
      update(factors[c.group], at(params), grads[c.tensor].const_data_ptr<float>() + c.first, at(exp_avgs),
             at(exp_avg_sqs), at(averages), c.count);
    }
  });
}

}  // namespace gdd_fast::cpu
