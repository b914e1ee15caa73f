// Storage types and the types of their arithmetic.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

namespace gdd_fast::cuda {

// float, but double for double
template <typename T>
using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ inline T narrow(Real<T> x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// N neighbouring values as one load or store.
template <typename T, int N>
struct alignas(N * sizeof(T)) Vector {
  T at[N];
};

template <int N, typename T>
__device__ inline Vector<T, N> load(const T* p) {
  return *reinterpret_cast<const Vector<T, N>*>(p);
}

template <int N, typename T>
__device__ inline void store(T* p, const Vector<T, N>& values) {
  *reinterpret_cast<Vector<T, N>*>(p) = values;
}

}  // namespace gdd_fast::cuda
