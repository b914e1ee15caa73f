// As much of CUDA as csrc/cuda uses, on the processor: the blocks of a launch run one after the other, and so do the
// threads of a block, each up to its next __syncthreads(). Found under the names of CUDA's and c10/cuda's headers.
//
// ON_HOST_MOST   if set, the largest grid dimension and 32-bit index: small ones reach the loops over what is left
// ON_HOST_REVERSE=1   the last block and thread first: results that depend on the order differ from the definition's
#pragma once
#include <c10/core/Device.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __shared__ static  // there is but one block at a time
#define __syncthreads() on_host::yield()
#define C10_CUDA_CHECK(error) TORCH_INTERNAL_ASSERT((error) == 0)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

using cudaError_t = int;
using cudaStream_t = void*;
inline cudaError_t cudaGetLastError() { return 0; }

namespace c10::cuda {
struct CUDAGuard {
  explicit CUDAGuard(c10::Device) {}
};
inline cudaStream_t getCurrentCUDAStream() { return nullptr; }
}  // namespace c10::cuda

using std::isfinite;
using std::max;
using std::min;

using __half = c10::Half;
using __nv_bfloat16 = c10::BFloat16;
inline float __half2float(__half x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline float __fadd_rn(float a, float b) { return a + b; }  // built with -ffp-contract=off
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }

namespace on_host {

inline int64_t setting(const char* name, int64_t otherwise) {
  const char* text = std::getenv(name);
  return text ? std::atoll(text) : otherwise;
}

// A limit of the launchers, or a smaller one.
inline int64_t most(int64_t limit) { return std::min(limit, setting("ON_HOST_MOST", limit)); }

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(128 << 10);
  bool done = false;
};

inline ucontext_t scheduler;
inline Fiber* running;
inline const std::function<void()>* body;

inline void yield() { swapcontext(&running->context, &scheduler); }

inline void enter() {
  (*body)();
  running->done = true;  // and on to the scheduler, by uc_link
}

// Threads that meet at barriers: in turns, all to the next one.
inline void run_in_turns(const std::vector<unsigned>& threads, const std::function<void()>& kernel) {
  static std::vector<Fiber> fibers(1024);
  body = &kernel;
  for (unsigned t : threads) {
    Fiber& f = fibers[t];
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = &scheduler;
    f.done = false;
    makecontext(&f.context, enter, 0);
  }
  for (bool done = false; !done;) {
    size_t finished = 0;
    for (unsigned t : threads) {
      threadIdx.x = t;
      running = &fibers[t];
      swapcontext(&scheduler, &running->context);
      finished += running->done;
    }
    done = finished > 0;
    TORCH_CHECK(finished % threads.size() == 0, "only some threads of a block came to a __syncthreads()");
  }
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

// kernel<<<configuration>>>(...), where `kernel` is the call for one thread; blocks have one dimension.
inline void launch(const Configuration& c, bool synchronises, const std::function<void()>& kernel) {
  TORCH_CHECK(c.grid.x > 0 && c.grid.y > 0 && c.grid.z > 0 && c.grid.y < 65536 && c.grid.z < 65536, "not a grid");
  TORCH_CHECK(c.block.x > 0 && c.block.x <= 1024 && c.block.y == 1 && c.block.z == 1 && c.shared == 0, "not a block");
  const bool reverse = setting("ON_HOST_REVERSE", 0) == 1;
  std::vector<unsigned> threads(c.block.x);
  for (unsigned t = 0; t < c.block.x; t++) threads[t] = reverse ? c.block.x - 1 - t : t;
  gridDim = c.grid, blockDim = c.block;
  const int64_t blocks = static_cast<int64_t>(c.grid.x) * c.grid.y * c.grid.z;
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t at = reverse ? blocks - 1 - b : b;
    blockIdx = dim3(at % c.grid.x, at / c.grid.x % c.grid.y, at / c.grid.x / c.grid.y);
    if (synchronises) {
      run_in_turns(threads, kernel);
    } else {
      for (unsigned t : threads) {
        threadIdx.x = t;
        kernel();
      }
    }
  }
}

}  // namespace on_host
