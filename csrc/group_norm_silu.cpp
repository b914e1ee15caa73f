// gdd_fast_C::group_norm_silu: checks, the outputs, the schema. Its definition is in gdd_fast/ops/group_norm_silu.py.
#include "group_norm_silu.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "strides.h"

namespace gdd_fast {
namespace {

NormMap norm_map(const at::Tensor& x, bool channels_last, const char* name) {
  TORCH_CHECK_VALUE(x.dim() == 4, "group_norm_silu: ", name, " must be (N, C, H, W), not of shape ", x.sizes());
  TORCH_CHECK_VALUE(evenly_spaced(x), "group_norm_silu: the pixels of ", name, " must be evenly spaced");
  const ImageStrides s = image_strides(x);
  // a step along a dimension of size 1 is never taken
  const bool fits = channels_last ? s.channel == 1 || s.channels == 1 : s.pixel == 1 || s.pixels == 1;
  TORCH_CHECK_VALUE(fits, "group_norm_silu: ", name, " is not in the memory format asked for; strides are ",
                    x.strides());
  return {x, s.channels, s.image, channels_last ? 1 : s.channel, channels_last ? s.pixel : 1};
}

const float* parameter(const at::Tensor& t, int64_t channels, const char* name) {
  TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat && t.is_contiguous() && t.numel() == channels,
                    "group_norm_silu: ", name, " must be float32, contiguous and of ", channels, " channels");
  return t.const_data_ptr<float>();
}

NormRows rows(const std::optional<at::Tensor>& t, int64_t images, int64_t channels, const char* name) {
  if (!t.has_value()) return {};
  TORCH_CHECK_VALUE(t->scalar_type() == at::kFloat && t->dim() == 2 && t->size(1) == channels &&
                        (t->stride(1) == 1 || channels == 1) && (t->size(0) == 1 || t->size(0) == images),
                    "group_norm_silu: ", name, " must be float32 (N or 1, ", channels, ") with contiguous rows");
  return {t->const_data_ptr<float>(), t->size(0) == 1 ? 0 : t->stride(0)};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> group_norm_silu(
    const at::Tensor& x, const std::optional<at::Tensor>& skip, int64_t groups, const at::Tensor& weight,
    const at::Tensor& bias, double eps, const std::optional<at::Tensor>& add, const std::optional<at::Tensor>& scale,
    const std::optional<at::Tensor>& shift, bool silu, bool channels_last) {
  const NormMap first = norm_map(x, channels_last, "x");
  const NormMap second = skip.has_value() ? norm_map(*skip, channels_last, "skip") : NormMap{x, 0, 0, 0, 0};
  TORCH_CHECK_VALUE(!skip.has_value() || (skip->scalar_type() == x.scalar_type() && skip->size(0) == x.size(0) &&
                                          skip->size(2) == x.size(2) && skip->size(3) == x.size(3)),
                    "group_norm_silu: x and skip must match but in channels");
  const int64_t images = x.size(0), channels = first.channels + second.channels, pixels = x.size(2) * x.size(3);
  TORCH_CHECK_VALUE(groups > 0 && channels > 0 && channels % groups == 0 && pixels > 0, "group_norm_silu: ", channels,
                    " channels of ", pixels, " pixels cannot be normalised in ", groups, " groups");
  const GroupNormSilu g{images,
                        channels,
                        pixels,
                        groups,
                        eps,
                        silu,
                        channels_last,
                        parameter(weight, channels, "weight"),
                        parameter(bias, channels, "bias"),
                        rows(add, images, channels, "add"),
                        rows(scale, images, channels, "scale"),
                        rows(shift, images, channels, "shift")};
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  at::Tensor y = at::empty({images, channels, x.size(2), x.size(3)}, x.options().memory_format(format));
  at::Tensor mean = at::empty({images, groups}, x.options().dtype(at::kFloat));
  at::Tensor rstd = at::empty({images, groups}, x.options().dtype(at::kFloat));
  if (images != 0) cpu::group_norm_silu(g, first, second, y, mean, rstd);
  return {y, mean, rstd};
}

}  // namespace gdd_fast

TORCH_LIBRARY_FRAGMENT(gdd_fast_C, m) {
  m.def(
      "group_norm_silu(Tensor x, Tensor? skip, int groups, Tensor weight, Tensor bias, float eps, Tensor? add, "
      "Tensor? scale, Tensor? shift, bool silu, bool channels_last) -> (Tensor y, Tensor mean, Tensor rstd)");
}

TORCH_LIBRARY_IMPL(gdd_fast_C, CPU, m) { m.impl("group_norm_silu", &gdd_fast::group_norm_silu); }
