// The launchers of discriminator_input; discriminator_input.h is what the CUDA kernel sees of them.
#pragma once
#include <vector>

#include "devices.h"
#include "discriminator_input.h"

namespace gdd_fast {

GDD_FAST_LAUNCHERS(void discriminator_input(const DiscriminatorInput& d, const at::Tensor& x,
                                            std::vector<at::Tensor>& ys);
                   void discriminator_input_backward(const DiscriminatorInput& d, at::TensorList dys, at::Tensor& dx);)

}  // namespace gdd_fast
