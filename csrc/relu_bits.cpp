// gdd_fast_C::relu_bits_ and mask_bits: checks, the outputs, the schemas. Their definitions are in
// gdd_fast/ops/relu_bits.py.
#include "relu_bits.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "devices.h"

namespace gdd_fast {
namespace {

void check_dense(const at::Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(x.is_floating_point(), name, " must be floating, not ", x.scalar_type());
  TORCH_CHECK_VALUE(x.is_non_overlapping_and_dense(), name, " must be dense; strides are ", x.strides());
}

}  // namespace

at::Tensor relu_bits_(at::Tensor& y, double ceiling) {
  check_dense(y, "relu_bits_: y");
  at::Tensor bits = at::empty({(y.numel() + 7) / 8}, y.options().dtype(at::kByte));
  if (y.numel() != 0) cpu::relu_bits_(y, ceiling, bits);
  return bits;
}

at::Tensor mask_bits(const at::Tensor& dy, const at::Tensor& bits) {
  check_dense(dy, "mask_bits: dy");
  TORCH_CHECK_VALUE(bits.scalar_type() == at::kByte && bits.is_contiguous() && bits.numel() == (dy.numel() + 7) / 8,
                    "mask_bits: bits must be ", (dy.numel() + 7) / 8, " contiguous bytes, not ", bits.sizes(), " of ",
                    bits.scalar_type());
  at::Tensor dx = at::empty_like(dy);
  if (dy.numel() != 0) cpu::mask_bits(dy, bits, dx);
  return dx;
}

}  // namespace gdd_fast

GDD_FAST_CPU_OPERATOR(relu_bits_, "(Tensor(a!) y, float ceiling) -> Tensor")
GDD_FAST_CPU_OPERATOR(mask_bits, "(Tensor dy, Tensor bits) -> Tensor")
