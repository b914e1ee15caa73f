// The Python module gdd_fast._C: importing it registers the operators, each in its own file.
#include <pybind11/pybind11.h>

#include <string>

#include "binders.h"
#include "gdd_fast_sources.h"  // written by setup.py

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
  for (const auto bind : gdd_fast::binders()) bind(m);
  m.def("build_info", &build_info, "Compilers, flags, CUDA architectures, and the torch and Python it was built for.");
}
