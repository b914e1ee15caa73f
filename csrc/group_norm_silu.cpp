// gdd_fast_C::group_norm_silu and its backward: checks, the outputs, the schemas. Their definitions are in
// gdd_fast/ops/group_norm_silu.
#include "group_norm_silu.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "devices.h"
#include "strides.h"

namespace gdd_fast {
namespace {

NormMap norm_map(const at::Tensor& x, bool channels_last, const char* name) {
  TORCH_CHECK_VALUE(x.dim() == 4, "group_norm_silu: ", name, " must be (N, C, H, W), not of shape ", x.sizes());
  TORCH_CHECK_VALUE(evenly_spaced(x), "group_norm_silu: the pixels of ", name, " must be evenly spaced");
  const ImageStrides s = image_strides(x);
  // a step along a dimension of size 1 is never taken
  const bool fits = channels_last ? s.channel == 1 || s.channels == 1 : s.pixel == 1 || s.pixels == 1;
  TORCH_CHECK_VALUE(fits, "group_norm_silu: ", name, " is not in the requested memory format; strides are ",
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

// The maps and parameters of a call; `second` has no channels if there is no skip.
GroupNormSilu described(const at::Tensor& x, const NormMap& first, const NormMap& second, int64_t groups,
                        const at::Tensor& weight, const at::Tensor& bias, double eps,
                        const std::optional<at::Tensor>& add, const std::optional<at::Tensor>& scale,
                        const std::optional<at::Tensor>& shift, bool silu, bool channels_last) {
  const at::Tensor& skip = second.map;
  TORCH_CHECK_VALUE(skip.scalar_type() == x.scalar_type() && skip.size(0) == x.size(0) && skip.size(2) == x.size(2) &&
                        skip.size(3) == x.size(3),
                    "group_norm_silu: x and skip must match in all but channels");
  const int64_t images = x.size(0), channels = first.channels + second.channels, pixels = x.size(2) * x.size(3);
  TORCH_CHECK_VALUE(groups > 0 && channels > 0 && channels % groups == 0 && pixels > 0, "group_norm_silu: ", channels,
                    " channels of ", pixels, " pixels cannot be normalised in ", groups, " groups");
  return {images,
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
}

NormMap skip_map(const at::Tensor& x, const std::optional<at::Tensor>& skip, bool channels_last) {
  return skip.has_value() ? norm_map(*skip, channels_last, "skip") : NormMap{x, 0, 0, 0, 0};
}

}  // namespace

at::Tensor group_norm_silu_inference(const at::Tensor& x, const std::optional<at::Tensor>& skip, int64_t groups,
                                     const at::Tensor& weight, const at::Tensor& bias, double eps,
                                     const std::optional<at::Tensor>& add, const std::optional<at::Tensor>& scale,
                                     const std::optional<at::Tensor>& shift, bool silu, bool channels_last, float* mean,
                                     float* rstd) {
  const NormMap first = norm_map(x, channels_last, "x"), second = skip_map(x, skip, channels_last);
  const GroupNormSilu g =
      described(x, first, second, groups, weight, bias, eps, add, scale, shift, silu, channels_last);
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  at::Tensor y = at::empty({g.images, g.channels, x.size(2), x.size(3)}, x.options().memory_format(format));
  if (g.images != 0) cpu::group_norm_silu(g, first, second, y, mean, rstd);
  return y;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> group_norm_silu(
    const at::Tensor& x, const std::optional<at::Tensor>& skip, int64_t groups, const at::Tensor& weight,
    const at::Tensor& bias, double eps, const std::optional<at::Tensor>& add, const std::optional<at::Tensor>& scale,
    const std::optional<at::Tensor>& shift, bool silu, bool channels_last) {
  TORCH_CHECK_VALUE(x.dim() == 4 && groups > 0, "group_norm_silu: x must be (N, C, H, W), not of shape ", x.sizes(),
                    ", and in groups, not ", groups);
  const at::Tensor mean = at::empty({x.size(0), groups}, x.options().dtype(at::kFloat)), rstd = at::empty_like(mean);
  at::Tensor y = group_norm_silu_inference(x, skip, groups, weight, bias, eps, add, scale, shift, silu, channels_last,
                                           mean.mutable_data_ptr<float>(), rstd.mutable_data_ptr<float>());
  return {y, mean, rstd};
}

std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>> group_norm_silu_backward(
    const at::Tensor& dy, const at::Tensor& x, const std::optional<at::Tensor>& skip, const at::Tensor& weight,
    const at::Tensor& bias, const std::optional<at::Tensor>& add, const std::optional<at::Tensor>& scale,
    const std::optional<at::Tensor>& shift, const at::Tensor& mean, const at::Tensor& rstd, bool silu) {
  const NormMap first = norm_map(x, true, "x"), second = skip_map(x, skip, true), given = norm_map(dy, true, "dy");
  TORCH_CHECK_VALUE(mean.dim() == 2 && mean.size(0) == x.size(0) && mean.sizes() == rstd.sizes(),
                    "group_norm_silu_backward: mean and rstd must be (N, groups)");
  for (const auto& t : {mean, rstd}) {
    TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat && t.is_contiguous(),
                      "group_norm_silu_backward: mean and rstd must be float32 and contiguous");
  }
  const GroupNormSilu g = described(x, first, second, mean.size(1), weight, bias, 0, add, scale, shift, silu, true);
  TORCH_CHECK_VALUE(dy.scalar_type() == x.scalar_type() && dy.size(0) == g.images && given.channels == g.channels &&
                        dy.size(2) == x.size(2) && dy.size(3) == x.size(3),
                    "group_norm_silu_backward: dy does not match the result");
  const auto like = [&](const NormMap& map) {
    return at::empty({g.images, map.channels, x.size(2), x.size(3)},
                     x.options().memory_format(at::MemoryFormat::ChannelsLast));
  };
  at::Tensor dx = like(first), dskip = like(second);
  // separate memory for each: an operator's results must not be views of one another
  std::vector<at::Tensor> by_image;
  for (int i = 0; i < 5; i++) by_image.push_back(at::empty({g.images, g.channels}, x.options().dtype(at::kFloat)));
  if (g.images != 0) cpu::group_norm_silu_backward(g, given, first, second, mean, rstd, dx, dskip, by_image);
  return {dx, dskip, by_image};
}

}  // namespace gdd_fast

GDD_FAST_CPU_OPERATOR(
    group_norm_silu,
    "(Tensor x, Tensor? skip, int groups, Tensor weight, Tensor bias, float eps, Tensor? add, "
    "Tensor? scale, Tensor? shift, bool silu, bool channels_last) -> (Tensor y, Tensor mean, Tensor rstd)")
GDD_FAST_CPU_OPERATOR(
    group_norm_silu_backward,
    "(Tensor dy, Tensor x, Tensor? skip, Tensor weight, Tensor bias, Tensor? add, Tensor? scale, Tensor? shift, "
    "Tensor mean, Tensor rstd, bool silu) -> (Tensor dx, Tensor dskip, Tensor[] rows)")
