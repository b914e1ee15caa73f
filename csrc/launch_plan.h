// Launches of Triton kernels that are worked out once per shape and repeated without Python.
//
// What an operator's call launches depends only on its inputs' shapes, strides, dtypes, devices and alignments and on
// its numbers. The Python launchers (kernels/*.py) describe it once; a LaunchPlan repeats it on other memory: it
// allocates the results and passes the same grids and arguments to the driver, with the current tensors' addresses. It
// remembers no values and no addresses.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/custom_class.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

namespace gdd_fast {

class LaunchPlan {
 public:
  // As gdd_fast.kernels._plans.plan describes it.
  LaunchPlan(at::Device device, size_t inputs, const pybind11::tuple& description);
  ~LaunchPlan();
  LaunchPlan(const LaunchPlan&) = delete;
  LaunchPlan& operator=(const LaunchPlan&) = delete;

  // The results for inputs like the plan's; absent inputs are undefined tensors.
  std::vector<at::Tensor> operator()(at::ArrayRef<at::Tensor> inputs) const;

 private:
  struct Made {
    std::vector<int64_t> sizes, strides;
    at::TensorOptions options;
  };
  struct Launch {
    PyObject* interpreted = nullptr;  // runs the kernel if it is not compiled
    void* function = nullptr;
    unsigned grid[3] = {1, 1, 1}, threads = 0, shared = 0;
    std::vector<int64_t> slots;     // by argument: index of the tensor, inputs before made_, or -1
    std::vector<uint64_t> numbers;  // by argument: its bits, if it is not a tensor
  };
  void launch(const Launch& launch, const std::vector<at::Tensor>& tensors) const;

  at::Device device_;
  size_t results_;
  std::vector<Made> made_;
  std::vector<Launch> launches_;
};

enum class Direction { kForward, kBackward };

// The plans of one operator. `planner` decides in Python, once per kind of call, which kernels run, if any.
class LaunchPlans : public torch::CustomClassHolder {
 public:
  // planner(direction, backend, inputs, numbers) -> a description, or None if Triton kernels should not run; it raises
  // what the operator raises.
  explicit LaunchPlans(pybind11::object planner);
  ~LaunchPlans() override;

  using Numbers = std::initializer_list<double>;
  std::shared_ptr<const LaunchPlan> find(Direction direction, const std::string& backend,
                                         at::ArrayRef<at::Tensor> inputs, Numbers numbers);
  size_t size() const;

 private:
  using Key = std::vector<int64_t>;
  using View = std::span<const int64_t>;
  struct Hash {
    using is_transparent = void;
    size_t operator()(View key) const;
  };
  struct Equal {
    using is_transparent = void;
    bool operator()(View a, View b) const;
  };
  PyObject* planner_;
  mutable std::mutex mutex_;
  std::unordered_map<Key, std::shared_ptr<const LaunchPlan>, Hash, Equal> plans_;
};

using Plans = c10::intrusive_ptr<LaunchPlans>;
using Plan = std::shared_ptr<const LaunchPlan>;

// Whether a call with these is computed at once: no dispatch mode is active, and none is a tensor subclass.
bool unobserved(at::ArrayRef<at::Tensor> tensors);

// Whether autograd matters for a call with these: it is on, and one requires a gradient or has a forward-mode one.
bool wants_gradient(at::ArrayRef<at::Tensor> tensors);

}  // namespace gdd_fast
