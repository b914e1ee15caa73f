// The arguments of adam_ema_ besides its tensors.
#pragma once
#include <cstdint>

namespace gdd_fast {

// Options of `tensors` consecutive parameters.
struct AdamGroup {
  int64_t tensors;
  double beta1, beta2, eps, weight_decay;
};

}  // namespace gdd_fast
