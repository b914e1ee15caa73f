// gdd_fast_C::discriminator_input and its adjoint: checks, outputs, dispatch. The definition is discriminator_input_ref
// in gdd_fast/ops/discriminator_input.py.
#include <ATen/ops/empty.h>

#include "discriminator_input_launchers.h"

namespace gdd_fast {
namespace {

DiscriminatorInput describe(const at::Tensor& x, at::ArrayRef<double> scale, at::ArrayRef<double> shift, int64_t size) {
  TORCH_CHECK_VALUE(!scale.empty() && scale.size() % 3 == 0 && scale.size() <= 3 * kBackbones &&
                        (shift.empty() || shift.size() == scale.size()),
                    "discriminator_input: scale and shift must hold three numbers for each of 1 to ", kBackbones,
                    " backbones");
  TORCH_CHECK_VALUE(size < (1 << 15) && x.size(2) < (1 << 16) && x.size(3) < (1 << 16),
                    "discriminator_input: the results' side must be below 2^15, those of images below 2^16");
  DiscriminatorInput d{};
  d.images = x.size(0), d.channels = x.size(1), d.height = x.size(2), d.width = x.size(3), d.size = size;
  d.stride_n = x.stride(0), d.stride_c = x.stride(1), d.stride_h = x.stride(2), d.stride_w = x.stride(3);
  d.step_h = static_cast<double>(d.height) / static_cast<double>(size);
  d.step_w = static_cast<double>(d.width) / static_cast<double>(size);
  d.backbones = static_cast<int>(scale.size() / 3);
  for (size_t k = 0; k < scale.size(); k++) {
    d.scale[k / 3][k % 3] = static_cast<float>(scale[k]);
    d.shift[k / 3][k % 3] = shift.empty() ? 0.f : static_cast<float>(shift[k]);
  }
  return d;
}

void check_dtype(at::ScalarType dtype) {
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
                    "discriminator_input: tensors must be float32, bfloat16 or float16, not ", dtype);
}

}  // namespace

std::vector<at::Tensor> discriminator_input(const at::Tensor& x, at::ArrayRef<double> scale, at::ArrayRef<double> shift,
                                            int64_t size, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(x.dim() == 4 && (x.size(1) == 1 || x.size(1) == 3) && x.size(2) > 0 && x.size(3) > 0 && size > 0,
                    "discriminator_input: x must be (N, 1 or 3, H, W), not of shape ", x.sizes());
  check_dtype(x.scalar_type());
  check_dtype(dtype);
  const DiscriminatorInput d = describe(x, scale, shift, size);
  std::vector<at::Tensor> ys;
  for (int b = 0; b < d.backbones; b++) {
    ys.push_back(
        at::empty({d.images, 3, size, size}, x.options().dtype(dtype).memory_format(at::MemoryFormat::ChannelsLast)));
  }
  if (d.images == 0) return ys;
  GDD_FAST_LAUNCH(x, discriminator_input(d, x, ys));
  return ys;
}

at::Tensor discriminator_input_backward(at::TensorList dys, at::ArrayRef<double> scale, int64_t channels,
                                        int64_t height, int64_t width, at::ScalarType dtype, bool channels_last) {
  TORCH_CHECK_VALUE(!dys.empty() && dys.size() * 3 == scale.size(),
                    "discriminator_input: one gradient for each backbone");
  TORCH_CHECK_VALUE(channels == 1 || channels == 3, "discriminator_input: images have 1 or 3 channels, not ", channels);
  const at::Tensor& first = dys[0];
  check_dtype(first.scalar_type());
  check_dtype(dtype);
  for (const at::Tensor& dy : dys) {
    TORCH_CHECK_VALUE(dy.dim() == 4 && dy.sizes() == first.sizes() && dy.scalar_type() == first.scalar_type() &&
                          dy.device() == first.device() && dy.size(1) == 3 && dy.size(2) == dy.size(3),
                      "discriminator_input: the gradients must be of one shape (N, 3, size, size) and type");
    TORCH_CHECK_VALUE(dy.is_contiguous(at::MemoryFormat::ChannelsLast),
                      "discriminator_input: the gradients must be channels_last; strides are ", dy.strides());
  }
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  at::Tensor dx =
      at::empty({first.size(0), channels, height, width}, first.options().dtype(dtype).memory_format(format));
  const DiscriminatorInput d = describe(dx, scale, {}, first.size(2));
  if (dx.numel() == 0) return dx;
  GDD_FAST_LAUNCH(dx, discriminator_input_backward(d, dys, dx));
  return dx;
}

}  // namespace gdd_fast

GDD_FAST_OPERATOR(discriminator_input,
                  "(Tensor x, float[] scale, float[] shift, int size, ScalarType dtype) -> Tensor[]")
GDD_FAST_OPERATOR(discriminator_input_backward,
                  "(Tensor[] dys, float[] scale, int channels, int height, int width, ScalarType dtype, "
                  "bool channels_last) -> Tensor")
