// A sequence of operators, recorded once and repeated without Python: a network of fixed shapes makes the same calls
// every time, and for small maps Python takes as long to make them as the operators take to compute. Every repetition
// calls the operators through the dispatcher, with new tensors.
#include <ATen/ScalarOps.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "binders.h"
#include "launch_plan.h"

namespace gdd_fast {
namespace {

class Recording {
 public:
  // Starts recording a function of these tensors, which take the first slots.
  explicit Recording(std::vector<at::Tensor> inputs) {
    for (const auto& t : inputs) remember(t);
    inputs_ = inputs.size();
  }

  // Adds a call and its result. False if it cannot be repeated: a result is not a tensor, or an argument is a list with
  // tensors made during the recording.
  bool add(const std::string& name, const std::string& overload, const pybind11::tuple& arguments,
           const pybind11::dict& options, const pybind11::object& result) {
    const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
    Step step{op, {}, {}, {}};
    const auto& formals = op.schema().arguments();
    for (size_t i = 0; i < formals.size(); i++) {
      const pybind11::str option(formals[i].name());
      if (i < arguments.size()) {
        step.arguments.push_back(value(arguments[i], formals[i].type()));
      } else if (options.contains(option)) {
        step.arguments.push_back(value(options[option], formals[i].type()));
      } else {
        step.arguments.push_back(formals[i].default_value().value());
      }
    }
    for (size_t i = 0; i < step.arguments.size(); i++) {
      c10::IValue& argument = step.arguments[i];
      if (argument.isTensor() && argument.toTensor().defined()) {
        const auto found = slots_.find(argument.toTensor().unsafeGetTensorImpl());
        if (found == slots_.end()) continue;  // a constant
        step.read.emplace_back(i, found->second);
        argument = c10::IValue();
      } else if (argument.isTensorList()) {
        for (const at::Tensor& t : argument.toTensorVector()) {
          if (slots_.count(t.unsafeGetTensorImpl())) return false;
        }
      }
    }
    if (!remember_all(result)) return false;
    steps_.push_back(std::move(step));
    return true;
  }

  // Ends the recording of a function that returned these. False if one is neither an input nor made during it.
  bool finish(const std::vector<at::Tensor>& results) {
    for (const auto& t : results) {
      const auto found = slots_.find(t.unsafeGetTensorImpl());
      if (found == slots_.end()) return false;
      results_.push_back(found->second);
    }
    // tensors that no later step reads are released, so that their memory can be reused
    std::vector<bool> needed(count_, false);
    for (const size_t slot : results_) needed[slot] = true;
    for (auto step = steps_.rbegin(); step != steps_.rend(); ++step) {
      for (const auto& [_, slot] : step->read) {
        if (!needed[slot]) step->last.push_back(slot);
        needed[slot] = true;
      }
    }
    kept_.clear();
    slots_.clear();
    return true;
  }

  // Nothing under a dispatch mode or for a tensor subclass. `inputs` must have the shapes, strides and dtypes of the
  // recorded ones.
  std::optional<std::vector<at::Tensor>> operator()(const std::vector<at::Tensor>& inputs) const {
    if (!unobserved(inputs)) return std::nullopt;
    TORCH_CHECK_VALUE(inputs.size() == inputs_, "a recording of ", inputs_, " tensors was given ", inputs.size());
    const pybind11::gil_scoped_release others_run;
    const at::AutoDispatchBelowADInplaceOrView no_gradient;
    std::vector<at::Tensor> slots(inputs);
    slots.reserve(count_);
    torch::jit::Stack stack;
    for (const Step& step : steps_) {
      stack = step.arguments;
      for (const auto& [i, slot] : step.read) stack[i] = slots[slot];
      for (const size_t slot : step.last) slots[slot].reset();
      step.op.callBoxed(stack);
      for (const c10::IValue& made : stack) {
        if (made.isTensor()) {
          slots.push_back(made.toTensor());
        } else {
          for (const at::Tensor& t : made.toTensorVector()) slots.push_back(t);
        }
      }
    }
    std::vector<at::Tensor> results;
    for (const size_t slot : results_) results.push_back(slots[slot]);
    return results;
  }

 private:
  struct Step {
    c10::OperatorHandle op;
    torch::jit::Stack arguments;                  // constants in place
    std::vector<std::pair<size_t, size_t>> read;  // which argument is which slot
    std::vector<size_t> last;                     // slots that no later step reads
  };

  // A number may stand for a tensor; it does not affect the result's dtype.
  static c10::IValue value(const pybind11::handle& given, const c10::TypePtr& type) {
    if (type->kind() == c10::TypeKind::TensorType && !THPVariable_Check(given.ptr()) && !given.is_none()) {
      at::Tensor number = c10::scalar_to_tensor(torch::jit::toIValue(given, c10::NumberType::get()).toScalar());
      number.unsafeGetTensorImpl()->set_wrapped_number(true);
      return number;
    }
    return torch::jit::toIValue(given, type);
  }

  void remember(const at::Tensor& t) {
    kept_.push_back(t);  // else another tensor may get its address
    slots_[t.unsafeGetTensorImpl()] = count_++;
  }

  bool remember_all(const pybind11::handle& result) {
    if (THPVariable_Check(result.ptr())) {
      remember(result.cast<at::Tensor>());
      return true;
    }
    if (!pybind11::isinstance<pybind11::tuple>(result) && !pybind11::isinstance<pybind11::list>(result)) return false;
    for (const auto& t : result) {
      if (!THPVariable_Check(t.ptr())) return false;
      remember(t.cast<at::Tensor>());
    }
    return true;
  }

  size_t inputs_ = 0, count_ = 0;
  std::vector<at::Tensor> kept_;
  std::unordered_map<const c10::TensorImpl*, size_t> slots_;
  std::vector<Step> steps_;
  std::vector<size_t> results_;
};

}  // namespace

static const Bind bind_recording([](pybind11::module_& m) {
  pybind11::class_<Recording>(m, "Recording")
      .def(pybind11::init<std::vector<at::Tensor>>())
      .def("add", &Recording::add)
      .def("finish", &Recording::finish)
      .def("__call__", &Recording::operator());
});

}  // namespace gdd_fast
