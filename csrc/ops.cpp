// The schema of every C++ operator, and the Python module gdd_fast._C whose import registers them.
#include "ops.h"

#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <string>

#include "gdd_fast_sources.h"  // written by setup.py

TORCH_LIBRARY(gdd_fast_C, m) {
  m.def("to_uint8(Tensor x) -> Tensor");
  m.def(
      "resample2d(Tensor x, Tensor kernel, Tensor? add, bool up, int padding, int out_height, int out_width, "
      "float gain, float scale, bool channels_last) -> Tensor");
  m.def("resample2d_takes(Tensor kernel) -> bool");  // whether the CPU operator can: K <= 64, a column times a row
  m.def("discriminator_input(Tensor x, float[] scale, float[] shift, int size, ScalarType dtype) -> Tensor[]");
  m.def(
      "discriminator_input_backward(Tensor[] dys, float[] scale, int channels, int height, int width, "
      "ScalarType dtype, bool channels_last) -> Tensor");
  m.def(
      "adam_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] averages, Tensor(e!)[] copies, Tensor(f!) step, Tensor(g!) skipped, Tensor lr, "
      "Tensor average_weight, int[] sizes, float[] beta1, float[] beta2, float[] eps, float[] weight_decay) -> ()");
}

namespace {

// The same functions for every device: they dispatch on it themselves, after their checks.
void implement(torch::Library& m) {
  m.impl("to_uint8", &gdd_fast::to_uint8);
  m.impl("resample2d", &gdd_fast::resample2d);
  m.impl("discriminator_input", &gdd_fast::discriminator_input);
  m.impl("discriminator_input_backward", &gdd_fast::discriminator_input_backward);
  m.impl("adam_ema_", &gdd_fast::adam_ema_);
}

}  // namespace

TORCH_LIBRARY_IMPL(gdd_fast_C, CPU, m) {
  implement(m);
  m.impl("resample2d_takes", &gdd_fast::resample2d_takes);
}

#ifdef GDD_FAST_WITH_CUDA
TORCH_LIBRARY_IMPL(gdd_fast_C, CUDA, m) { implement(m); }
#endif

namespace {

// What this file was built with; the GDD_FAST_* strings come from setup.py.
pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = GDD_FAST_TORCH_VERSION;
  info["python"] = std::to_string(PY_MAJOR_VERSION) + "." + std::to_string(PY_MINOR_VERSION);
#ifdef __clang__
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = "GCC " __VERSION__;
#endif
  info["sources"] = GDD_FAST_SOURCES;
  info["cxx_flags"] = GDD_FAST_CXX_FLAGS;
#ifdef GDD_FAST_WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["cuda_version"] = GDD_FAST_CUDA_VERSION;
  info["cuda_architectures"] = GDD_FAST_CUDA_ARCHITECTURES;
  info["nvcc_flags"] = GDD_FAST_NVCC_FLAGS;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled operators of gdd_fast, registered as torch.ops.gdd_fast_C.";
  m.def("build_info", &build_info, "Compilers, flags, CUDA architectures, and the torch and Python it was built for.");
}
