// Functions of the module gdd_fast._C beside its operators, each bound in the file that has them.
#pragma once
#include <pybind11/pybind11.h>

#include <vector>

namespace gdd_fast {

using Binder = void (*)(pybind11::module_&);

inline std::vector<Binder>& binders() {
  static std::vector<Binder> all;
  return all;
}

// A static one of these has module.cpp call `binder` when the module is made.
struct Bind {
  explicit Bind(Binder binder) { binders().push_back(binder); }
};

}  // namespace gdd_fast
