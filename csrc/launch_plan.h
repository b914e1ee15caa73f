// Launches of Triton's kernels that are worked out once for a shape and repeated without Python.
//
// What a call of an operator launches is a function of its inputs' shapes, strides, types, devices and alignments and
// of its numbers. The Python launchers (kernels/*.py) say it once; a LaunchPlan repeats it on other memory: it
// allocates the results and hands the driver the same grids and arguments, with the addresses of the tensors at hand.
// No value and no address is remembered.
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

  // The results for inputs that the plan was made for; absent ones are undefined.
  std::vector<at::Tensor> operator()(at::ArrayRef<at::Tensor> inputs) const;

 private:
  struct Made {
    std::vector<int64_t> sizes, strides;
    at::TensorOptions options;
  };
  struct Launch {
    PyObject* interpreted = nullptr;  // what runs the kernel where it is not compiled
    void* function = nullptr;
    unsigned grid[3] = {1, 1, 1}, threads = 0, shared = 0;
    std::vector<int64_t> slots;     // by argument: which tensor, inputs before those made, or -1
    std::vector<uint64_t> numbers;  // by argument: its bits, if it is no tensor
  };
  void launch(const Launch& launch, const std::vector<at::Tensor>& tensors) const;

  at::Device device_;
  size_t results_;
  std::vector<Made> made_;
  std::vector<Launch> launches_;
};

enum class Direction { kForward, kBackward };

// The plans of one operator. Which kernels run, if any, `planner` decides in Python, once per kind of call.
class LaunchPlans : public torch::CustomClassHolder {
 public:
  // planner(direction, backend, inputs, numbers) -> a description, or None where Triton's kernels are not to run; it
  // raises what the operator raises.
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

// Whether a call with these is computed at once: no dispatch mode is active, and no tensor is of another class.
bool unobserved(at::ArrayRef<at::Tensor> tensors);

// Whether autograd has a say in a call with these: it is on, and one of them has a gradient of either mode.
bool wants_gradient(at::ArrayRef<at::Tensor> tensors);

}  // namespace gdd_fast
