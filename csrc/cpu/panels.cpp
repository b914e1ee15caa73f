// The kernels of panels.h by instruction set.
#include "cpu/panels.h"

#include <ATen/Version.h>

#include <string>

#include "cpu/floats.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define GDD_FAST_PANELS
#include <immintrin.h>
#endif

namespace gdd_fast::cpu {

#ifdef GDD_FAST_PANELS
#define GDD_FAST_KERNELS "cpu/panel_kernels.h"
#include "cpu/vector_sets.h"
#endif

const Panels& panels() {
  static const Panels found = [] {
#ifdef GDD_FAST_PANELS
    const std::string processor = at::get_cpu_capability();
    if (processor == "AVX512") {
      using namespace avx512;
      return Panels{2 * kVector, kVector, kRows, avx512::multiply<2>, avx512::multiply<1>};
    }
    if (processor == "AVX2") {
      using namespace avx2;
      return Panels{2 * kVector, kVector, kRows, avx2::multiply<2>, avx2::multiply<1>};
    }
#endif
    return Panels{};
  }();
  return found;
}

}  // namespace gdd_fast::cpu
