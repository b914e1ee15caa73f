// What every operator shares: its launchers by device, and its registration as torch.ops.gdd_fast_C.<name>.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/library.h>

// The namespace for CPU tensors. A test sets this to cuda to run those kernels on the CPU.
#ifndef GDD_FAST_CPU
#define GDD_FAST_CPU cpu
#endif

// Declares the same launchers in cpu and cuda; the latter exist only in builds with CUDA.
#define GDD_FAST_LAUNCHERS(...) \
  namespace cpu {               \
  __VA_ARGS__                   \
  }                             \
  namespace cuda {              \
  __VA_ARGS__                   \
  }

// GDD_FAST_LAUNCH(x, f(...)): f for x's device.
#ifdef GDD_FAST_WITH_CUDA
#define GDD_FAST_LAUNCH(x, call) ((x).is_cuda() ? cuda::call : GDD_FAST_CPU::call)
#define GDD_FAST_CUDA_OPERATOR(name) \
  TORCH_LIBRARY_IMPL(gdd_fast_C, CUDA, m) { m.impl(#name, &gdd_fast::name); }
#else
#define GDD_FAST_LAUNCH(x, call) GDD_FAST_CPU::call
#define GDD_FAST_CUDA_OPERATOR(name)
#endif

// Registers gdd_fast::name, which checks its arguments and launches, for CPU tensors or for both devices.
#define GDD_FAST_CPU_OPERATOR(name, schema)                      \
  TORCH_LIBRARY_FRAGMENT(gdd_fast_C, m) { m.def(#name schema); } \
  TORCH_LIBRARY_IMPL(gdd_fast_C, CPU, m) { m.impl(#name, &gdd_fast::name); }
#define GDD_FAST_OPERATOR(name, schema) \
  GDD_FAST_CPU_OPERATOR(name, schema)   \
  GDD_FAST_CUDA_OPERATOR(name)
