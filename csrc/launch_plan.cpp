// The plans of launch_plan.h: makes them from Python's description, and runs them.
#include "launch_plan.h"

#include <ATen/DeviceGuard.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>

#include <algorithm>
#include <bit>

#include "binders.h"

namespace py = pybind11;

namespace gdd_fast {
namespace {

constexpr size_t kMostPlans = 4096;  // with more, shapes do not recur: all are dropped
constexpr int64_t kAlignment = 16;   // in bytes: Triton specialises kernels on it

// Functions of the driver, looked up at run time, as the extension is also built without CUDA.
struct CudaDriver {
  int (*launch)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                unsigned block_z, unsigned shared, void* stream, void** arguments, void** extra);
  int (*current_context)(void** context);
  int (*device)(int* device, int ordinal);
  int (*retain_primary)(void** context, int device);
  int (*set_current_context)(void* context);
};

const CudaDriver& cuda_driver() {
  static const CudaDriver found = [] {
    void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    TORCH_CHECK(library != nullptr, "libcuda.so.1 was not found: Triton's kernels cannot be launched");
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
      TORCH_CHECK(function != nullptr, "libcuda.so.1 has no ", name, ": Triton's kernels cannot be launched");
    };
    CudaDriver driver{};
    find(driver.launch, "cuLaunchKernel");
    find(driver.current_context, "cuCtxGetCurrent");
    find(driver.device, "cuDeviceGet");
    find(driver.retain_primary, "cuDevicePrimaryCtxRetain");
    find(driver.set_current_context, "cuCtxSetCurrent");
    return driver;
  }();
  return found;
}

void check(int error, const char* what) { TORCH_CHECK(error == 0, "CUDA error ", error, " at ", what); }

// A thread that has not called CUDA's runtime, such as autograd's if the first kernel is one of these, has no context
// to launch in; a device guard does not create one.
void ensure_context(at::Device device) {
  const CudaDriver& driver = cuda_driver();
  void* context = nullptr;
  check(driver.current_context(&context), "the current context");
  if (context != nullptr) return;
  static std::mutex mutex;
  static std::unordered_map<int, void*> retained;  // for as long as the process lives
  const std::scoped_lock lock(mutex);
  void*& primary = retained[std::max<int>(device.index(), 0)];
  if (primary == nullptr) {
    int handle = 0;
    check(driver.device(&handle, std::max<int>(device.index(), 0)), "the device of a launch");
    check(driver.retain_primary(&primary, handle), "the context of a device");
  }
  check(driver.set_current_context(primary), "the context of a thread");
}

void* current_stream(at::Device device) {
  if (device.is_cpu()) return nullptr;
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

bool is_aligned(const at::Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kAlignment == 0; }

}  // namespace

bool unobserved(at::ArrayRef<at::Tensor> tensors) {
  if (c10::impl::dispatch_mode_enabled()) return false;
  return std::none_of(tensors.begin(), tensors.end(),
                      [](const at::Tensor& t) { return t.defined() && at::isTensorSubclassLike(t); });
}

bool wants_gradient(at::ArrayRef<at::Tensor> tensors) {
  const auto has = [](const at::Tensor& t) { return t.defined() && (t.requires_grad() || t._fw_grad(0).defined()); };
  return at::GradMode::is_enabled() && std::any_of(tensors.begin(), tensors.end(), has);
}

LaunchPlan::LaunchPlan(at::Device device, size_t inputs, const py::tuple& description) : device_(device) {
  results_ = description[0].cast<size_t>();
  for (const auto& made : description[1].cast<std::vector<at::Tensor>>()) {
    made_.push_back({made.sizes().vec(), made.strides().vec(), made.options()});
  }
  for (const auto item : description[2]) {
    Launch launch;
    if (PyCallable_Check(item.ptr())) {
      launch.interpreted = py::reinterpret_borrow<py::object>(item).release().ptr();
    } else {
      const auto [function, grid, threads, shared, arguments] =
          item.cast<std::tuple<uintptr_t, std::vector<unsigned>, unsigned, unsigned, py::list>>();
      launch.function = reinterpret_cast<void*>(function);
      std::copy_n(grid.begin(), std::min<size_t>(grid.size(), 3), launch.grid);
      launch.threads = threads;
      launch.shared = shared;
      for (const auto argument : arguments) {
        const auto [slot, number] = argument.cast<std::pair<int64_t, uint64_t>>();
        TORCH_CHECK(slot < static_cast<int64_t>(inputs + made_.size()), "a launch reads a tensor that it is not given");
        launch.slots.push_back(slot);
        launch.numbers.push_back(number);
      }
    }
    launches_.push_back(std::move(launch));
  }
}

LaunchPlan::~LaunchPlan() {
  if (!Py_IsInitialized()) return;
  const py::gil_scoped_acquire gil;
  for (const Launch& launch : launches_) Py_XDECREF(launch.interpreted);
}

std::vector<at::Tensor> LaunchPlan::operator()(at::ArrayRef<at::Tensor> inputs) const {
  const at::OptionalDeviceGuard guard(device_.is_cpu() ? std::nullopt : std::optional(device_));
  std::vector<at::Tensor> tensors;
  tensors.reserve(inputs.size() + made_.size());
  tensors.assign(inputs.begin(), inputs.end());
  for (const Made& made : made_) tensors.push_back(at::empty_strided(made.sizes, made.strides, made.options));
  for (const Launch& each : launches_) launch(each, tensors);
  const auto first = tensors.begin() + static_cast<int64_t>(inputs.size());
  return {std::make_move_iterator(first), std::make_move_iterator(first + static_cast<int64_t>(results_))};
}

void LaunchPlan::launch(const Launch& launch, const std::vector<at::Tensor>& tensors) const {
  if (launch.interpreted != nullptr) {
    const py::gil_scoped_acquire gil;
    py::list given;
    for (const auto& t : tensors) given.append(t.defined() ? py::cast(t) : py::none());
    py::reinterpret_borrow<py::object>(launch.interpreted)(given);
    return;
  }
  // the bits of each argument, then Triton's two scratch buffers, which these kernels do not use
  const size_t size = launch.slots.size() + 2;
  std::vector<uint64_t> values(size, 0);
  std::vector<void*> arguments(size);
  for (size_t i = 0; i < size; i++) {
    arguments[i] = &values[i];
    if (i >= launch.slots.size()) continue;
    const int64_t slot = launch.slots[i];
    values[i] = slot < 0 ? launch.numbers[i] : reinterpret_cast<uint64_t>(tensors[slot].data_ptr());
  }
  const auto [x, y, z] = launch.grid;
  ensure_context(device_);
  check(cuda_driver().launch(launch.function, x, y, z, launch.threads, 1, 1, launch.shared, current_stream(device_),
                             arguments.data(), nullptr),
        "the launch of a Triton kernel");
}

LaunchPlans::LaunchPlans(py::object planner) : planner_(planner.release().ptr()) {}

LaunchPlans::~LaunchPlans() {
  if (!Py_IsInitialized()) return;
  const py::gil_scoped_acquire gil;
  Py_DECREF(planner_);
}

size_t LaunchPlans::Hash::operator()(View key) const {
  uint64_t hash = 0xcbf29ce484222325;
  for (const int64_t word : key) hash = (std::rotl(hash, 5) ^ static_cast<uint64_t>(word)) * 0x9e3779b97f4a7c15;
  return hash;
}

bool LaunchPlans::Equal::operator()(View a, View b) const { return std::ranges::equal(a, b); }

size_t LaunchPlans::size() const {
  const std::scoped_lock lock(mutex_);
  return plans_.size();
}

Plan LaunchPlans::find(Direction direction, const std::string& backend, at::ArrayRef<at::Tensor> inputs,
                       Numbers numbers) {
  c10::SmallVector<int64_t, 128> key;
  key.push_back(static_cast<int64_t>(direction) * 2 + (backend == "auto"));
  for (const double number : numbers) key.push_back(std::bit_cast<int64_t>(number));
  for (const at::Tensor& t : inputs) {
    if (!t.defined()) {
      key.push_back(-1);
      continue;
    }
    const at::Device device = t.device();
    key.push_back(t.dim() << 32 | int64_t{is_aligned(t)} << 24 | static_cast<int64_t>(t.scalar_type()) << 16 |
                  static_cast<int64_t>(device.type()) << 8 | static_cast<uint8_t>(device.index()));
    key.append(t.sizes().begin(), t.sizes().end());
    key.append(t.strides().begin(), t.strides().end());
  }
  const View view(key.data(), key.size());
  {
    const std::scoped_lock lock(mutex_);
    if (const auto found = plans_.find(view); found != plans_.end()) return found->second;
  }
  // not under the lock: a thread that waits for it may hold the GIL
  Plan made;
  {
    const py::gil_scoped_acquire gil;
    py::list tensors;
    py::tuple given(numbers.size());
    for (const auto& t : inputs) tensors.append(t.defined() ? py::cast(t) : py::none());
    for (size_t i = 0; i < numbers.size(); i++) given[i] = numbers.begin()[i];
    const char* const name = direction == Direction::kForward ? "forward" : "backward";
    const py::object description = py::reinterpret_borrow<py::object>(planner_)(name, backend, tensors, given);
    if (!description.is_none()) {
      made = std::make_shared<const LaunchPlan>(inputs[0].device(), inputs.size(), description.cast<py::tuple>());
    }
  }
  std::unordered_map<Key, Plan, Hash, Equal> forgotten;  // destroyed after the lock is released
  const std::scoped_lock lock(mutex_);
  if (plans_.size() >= kMostPlans) plans_.swap(forgotten);
  plans_.insert_or_assign(Key(key.begin(), key.end()), made);
  return made;
}

}  // namespace gdd_fast

static const gdd_fast::Bind bind_launch_plans([](py::module_& m) {
  using gdd_fast::LaunchPlans;
  py::class_<LaunchPlans, c10::intrusive_ptr<LaunchPlans>>(m, "LaunchPlans")
      .def(py::init([](py::object planner) { return c10::make_intrusive<LaunchPlans>(std::move(planner)); }))
      .def("__len__", &LaunchPlans::size);
  m.def(
      "current_stream",
      [](const at::Tensor& x) { return reinterpret_cast<uintptr_t>(gdd_fast::current_stream(x.device())); },
      "The handle of the stream that plans launch on, for tensors where x is.");
});
