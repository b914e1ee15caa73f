// What every operator shares: its launchers by device, and its registration as torch.ops.gdd_fast_C.<name>.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/library.h>

// The namespace that computes CPU tensors. A test names cuda here and runs those kernels on the processor.
#ifndef GDD_FAST_CPU
#define GDD_FAST_CPU cpu
#endif

// Declares the same launchers in cpu and cuda; those of cuda are there only where CUDA is built.
#define GDD_FAST_LAUNCHERS(...) \
  namespace cpu {               \
  __VA_ARGS__                   \
  }                             \
  namespace cuda {              \
  __VA_ARGS__                   \
  }

// GDD_FAST_LAUNCH(x, f(...)): f of the device that x is on.
#ifdef GDD_FAST_WITH_CUDA
#define GDD_FAST_LAUNCH(x, call) ((x).is_cuda() ? cuda::call : GDD_FAST_CPU::call)
#define GDD_FAST_CUDA_OPERATOR(name) \
  TORCH_LIBRARY_IMPL(gdd_fast_C, CUDA, m) { m.impl(#name, &gdd_fast::name); }
#else
#define GDD_FAST_LAUNCH(x, call) GDD_FAST_CPU::call
#define GDD_FAST_CUDA_OPERATOR(name)
#endif

// Registers gdd_fast::name, which checks its arguments and launches, for CPU tensors, or for those of both devices.
#define GDD_FAST_CPU_OPERATOR(name, schema)                      \
  TORCH_LIBRARY_FRAGMENT(gdd_fast_C, m) { m.def(#name schema); } \
  TORCH_LIBRARY_IMPL(gdd_fast_C, CPU, m) { m.impl(#name, &gdd_fast::name); }
#define GDD_FAST_OPERATOR(name, schema) \
  GDD_FAST_CPU_OPERATOR(name, schema)   \
  GDD_FAST_CUDA_OPERATOR(name)
