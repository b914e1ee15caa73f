// frozen_conv2d and planned_frozen_conv2d_relu: the autograd of gdd_fast/ops/frozen_conv2d.py and frozen_conv2d_relu.py
// in C++, around the convolutions of constant_convolution.h. Autograd through Python costs 0.1 ms per layer and step,
// as much as a small depthwise convolution. Triton kernels pack the bits if there are plans; otherwise a CPU does.
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <cmath>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "binders.h"
#include "constant_convolution.h"
#include "relu_bits_autograd.h"
#include "strides.h"

namespace gdd_fast {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// What backward needs besides tensors; in one object, as every entry of a context's map costs as much as a small
// operator.
struct Held : torch::CustomClassHolder {
  std::vector<int64_t> shape;  // of the input
  at::MemoryFormat format = at::MemoryFormat::Contiguous, out_format = at::MemoryFormat::Contiguous;
  Geometry geometry;
  bool has_bias = false;
  Plans plans;  // for the kernels that pack bits, if they are Triton's

  Held(const at::Tensor& x, const Bias& bias, Geometry g, Plans plans = {})
      : shape(x.sizes().vec()),
        format(memory_format(x)),
        geometry(std::move(g)),
        has_bias(bias.has_value()),
        plans(std::move(plans)) {}
};
using Holder = c10::intrusive_ptr<Held>;

at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, const Bias& bias, const Geometry& g);

// Linear in dy; its derivative is the convolution again.
struct InputGradient : torch::autograd::Function<InputGradient> {
  static at::Tensor compute(const at::Tensor& dy, const at::Tensor& weight, const Held& held) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return convolve_gradient(dy, weight, held.shape, held.format, held.geometry);
  }

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& dy, const at::Tensor& weight, const Holder& held) {
    ctx->save_for_backward({weight});
    ctx->saved_data["held"] = c10::IValue::make_capsule(held);
    return compute(dy, weight, *held);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& ddxs) {
    const Holder held = c10::static_intrusive_pointer_cast<Held>(ctx->saved_data["held"].toCapsule());
    return {convolution(ddxs[0], ctx->get_saved_variables()[0], Bias(), held->geometry), Variable(), Variable()};
  }
};

at::Tensor input_gradient(const at::Tensor& dy, const at::Tensor& weight, const Holder& held) {
  return at::GradMode::is_enabled() ? InputGradient::apply(dy, weight, held)
                                    : InputGradient::compute(dy, weight, *held);
}

// A node as PyTorch generates them for its own operators. torch::autograd::Function, as above, costs half as much again
// as this operator's other work, since its generic parts, such as the dispatch to autograd, run in every call.
struct ConvolutionBackward : torch::autograd::Node {
  torch::autograd::SavedVariable weight, bits;  // bits: of the following ReLU, if any
  Holder held;

  variable_list apply(variable_list&& dys) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list gradients(2);
    if (!dys[0].defined()) return gradients;
    const at::Tensor kernel = weight.unpack(), packed = bits.unpack();
    const at::Tensor dy = packed.defined() ? masked(held->plans, dys[0], packed, held->out_format) : dys[0];
    if (task_should_compute_output(0)) gradients[0] = input_gradient(dy, kernel, held);
    if (held->has_bias && task_should_compute_output(1)) gradients[1] = dy.sum({0, 2, 3});
    return gradients;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    weight.reset_data();
    bits.reset_data();
  }

  std::string name() const override { return "FrozenConvolutionBackward"; }
};

// Older versions of PyTorch hold graphs by std::shared_ptr, newer ones by c10::intrusive_ptr.
template <typename T>
auto make_node() {
  if constexpr (std::is_same_v<decltype(torch::autograd::Edge::function), std::shared_ptr<torch::autograd::Node>>) {
    return std::shared_ptr<T>(new T(), [](T* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<T>();
  }
}

void record(const at::Tensor& y, const at::Tensor& x, const at::Tensor& weight, const Bias& bias, const Holder& held,
            const at::Tensor& bits) {
  const auto node = make_node<ConvolutionBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(x, bias.value_or(at::Tensor())));
  node->weight = torch::autograd::SavedVariable(weight, false);
  if (bits.defined()) node->bits = torch::autograd::SavedVariable(bits, false);
  node->held = held;
  torch::autograd::set_history(y, node);
}

void refuse_forward_mode(const at::Tensor& x, const Bias& bias, const char* name) {
  TORCH_CHECK_NOT_IMPLEMENTED(!x._fw_grad(0).defined() && !(bias.has_value() && bias->_fw_grad(0).defined()), name,
                              " has no forward-mode derivative: pass backend=\"torch\"");
}

// A GPU's convolution adds its bias in a separate pass; Triton's kernel does so on the way.
at::Tensor convolve_and_clamp(const at::Tensor& x, const at::Tensor& weight, const Bias& bias, const Geometry& g,
                              double ceiling, const Plans& plans) {
  if (plans) {
    at::Tensor y = convolve(x, weight, Bias(), g);
    y = y.contiguous(memory_format(y));
    clamp_(plans, y, ceiling, bias.value_or(at::Tensor()));
    return y;
  }
  at::Tensor y = convolve(x, weight, bias, g);
  return std::isinf(ceiling) ? y.relu_() : y.clamp_(0, ceiling);
}

at::Tensor differentiable(const at::Tensor& x, const at::Tensor& weight, const Bias& bias, const Geometry& g,
                          double ceiling, const Plans& plans) {
  refuse_forward_mode(x, bias, "frozen_conv2d_relu");
  at::Tensor y, bits;
  const auto held = c10::make_intrusive<Held>(x, bias, g, plans);
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    y = convolve(x, weight, plans ? Bias() : bias, g);
    held->out_format = memory_format(y);
    y = y.contiguous(held->out_format);
    bits = pack_bits(plans, y, ceiling, plans ? bias.value_or(at::Tensor()) : at::Tensor());
  }
  record(y, x, weight, bias, held, bits);
  return y;
}

bool differentiated(const at::Tensor& x, const Bias& bias) {
  return at::GradMode::is_enabled() && (x.requires_grad() || (bias.has_value() && bias->requires_grad()));
}

at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, const Bias& bias, const Geometry& g) {
  if (!differentiated(x, bias)) return convolve(x, weight, bias, g);
  refuse_forward_mode(x, bias, "frozen_conv2d");
  at::Tensor y;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    y = convolve(x, weight, bias, g);
  }
  record(y, x, weight, bias, c10::make_intrusive<Held>(x, bias, g), at::Tensor());
  return y;
}

// x, weight and bias in the compute dtype, as from `prepare` in Python; nothing if the checks there would fail, or
// under a dispatch mode or with a tensor subclass.
struct Prepared {
  at::Tensor x, weight;
  Bias bias;
};
std::optional<Prepared> prepared(const at::Tensor& x, const at::Tensor& weight, const Bias& bias) {
  const auto fits = [&](const at::Tensor& t) { return t.device() == x.device() && t.is_floating_point(); };
  if (x.dim() != 4 || weight.dim() != 4 || !fits(x) || !fits(weight) || (bias.has_value() && !fits(*bias)) ||
      (weight.requires_grad() && at::GradMode::is_enabled()) || !unobserved({x, weight, bias.value_or(at::Tensor())})) {
    return std::nullopt;
  }
  const auto device = x.device().type();
  const bool casts = x.scalar_type() != at::kDouble && at::autocast::is_autocast_enabled(device);
  const auto type = casts ? at::autocast::get_autocast_dtype(device) : x.scalar_type();
  return Prepared{x.to(type), weight.to(type), bias.has_value() ? Bias(bias->to(type)) : bias};
}

// A size: one number for both directions, or two.
void push(Geometry& g, const pybind11::handle& size) {
  if (PyLong_Check(size.ptr())) {
    g.insert(g.end(), 2, size.cast<int64_t>());
  } else {
    const auto two = size.cast<std::pair<int64_t, int64_t>>();
    g.insert(g.end(), {two.first, two.second});
  }
}

Geometry pushed(const pybind11::handle& stride, const pybind11::handle& padding, const pybind11::handle& dilation,
                int64_t groups) {
  Geometry g;
  g.reserve(7);
  for (const auto& size : {stride, padding, dilation}) push(g, size);
  g.push_back(groups);
  return g;
}

// Either operator in one call from Python; nothing if `prepared` returns nothing.
std::optional<at::Tensor> planned(const Plans& plans, const at::Tensor& x, const at::Tensor& weight, const Bias& bias,
                                  const pybind11::handle& stride, const pybind11::handle& padding,
                                  const pybind11::handle& dilation, int64_t groups, double ceiling) {
  const Geometry g = pushed(stride, padding, dilation, groups);
  const pybind11::gil_scoped_release without_python;
  const auto given = prepared(x, weight, bias);
  if (!given) return std::nullopt;
  if (differentiated(given->x, given->bias)) {
    return differentiable(given->x, given->weight, given->bias, g, ceiling, plans);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return convolve_and_clamp(given->x, given->weight, given->bias, g, ceiling, plans);
}

std::optional<at::Tensor> called(const at::Tensor& x, const at::Tensor& weight, const Bias& bias,
                                 const pybind11::handle& stride, const pybind11::handle& padding,
                                 const pybind11::handle& dilation, int64_t groups) {
  const Geometry g = pushed(stride, padding, dilation, groups);
  const pybind11::gil_scoped_release without_python;
  const auto given = prepared(x, weight, bias);
  return given ? Bias(convolution(given->x, given->weight, given->bias, g)) : std::nullopt;
}

}  // namespace

static const Bind bind_calls([](pybind11::module_& m) {
  m.def("planned_frozen_conv2d_relu", &planned);
  m.def("frozen_conv2d", &called);
});

}  // namespace gdd_fast
