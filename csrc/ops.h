// The C++ operators: `op` checks its arguments and dispatches on the device to cpu::op or cuda::op.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace gdd_fast {

struct Resample;
struct DiscriminatorInput;
struct AdamGroup;

at::Tensor to_uint8(const at::Tensor& x);
at::Tensor resample2d(const at::Tensor& x, const at::Tensor& kernel, const std::optional<at::Tensor>& add, bool up,
                      int64_t padding, int64_t out_height, int64_t out_width, double gain, double scale,
                      bool channels_last);
bool resample2d_takes(const at::Tensor& kernel);
std::vector<at::Tensor> discriminator_input(const at::Tensor& x, at::ArrayRef<double> scale, at::ArrayRef<double> shift,
                                            int64_t size, at::ScalarType dtype);
at::Tensor discriminator_input_backward(at::TensorList dys, at::ArrayRef<double> scale, int64_t channels,
                                        int64_t height, int64_t width, at::ScalarType dtype, bool channels_last);
void adam_ema_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
               at::TensorList averages, at::TensorList copies, at::Tensor step, at::Tensor skipped,
               const at::Tensor& lr, const at::Tensor& average_weight, at::IntArrayRef sizes,
               at::ArrayRef<double> beta1, at::ArrayRef<double> beta2, at::ArrayRef<double> eps,
               at::ArrayRef<double> weight_decay);

namespace cpu {
void to_uint8(const at::Tensor& x, at::Tensor& y);
bool resample2d_takes(const at::Tensor& kernel);
void resample2d(const Resample& r, const at::Tensor& x, const at::Tensor& kernel, const std::optional<at::Tensor>& add,
                at::Tensor& y);
void discriminator_input(const DiscriminatorInput& d, const at::Tensor& x, std::vector<at::Tensor>& ys);
void discriminator_input_backward(const DiscriminatorInput& d, at::TensorList dys, at::Tensor& dx);
void adam_ema_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
               at::TensorList averages, at::TensorList copies, at::Tensor& step, at::Tensor& skipped,
               const at::Tensor& lr, const at::Tensor& average_weight, at::ArrayRef<AdamGroup> groups);
}  // namespace cpu

#ifdef GDD_FAST_WITH_CUDA
namespace cuda {
void to_uint8(const at::Tensor& x, at::Tensor& y);
void resample2d(const Resample& r, const at::Tensor& x, const at::Tensor& kernel, const std::optional<at::Tensor>& add,
                at::Tensor& y);
void discriminator_input(const DiscriminatorInput& d, const at::Tensor& x, std::vector<at::Tensor>& ys);
void discriminator_input_backward(const DiscriminatorInput& d, at::TensorList dys, at::Tensor& dx);
void adam_ema_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
               at::TensorList averages, at::TensorList copies, at::Tensor& step, at::Tensor& skipped,
               const at::Tensor& lr, const at::Tensor& average_weight, at::Tensor& found,
               at::ArrayRef<AdamGroup> groups);
}  // namespace cuda
#endif

}  // namespace gdd_fast
