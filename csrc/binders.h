// Functions of the module gdd_fast._C besides its operators, each bound in the file that defines it.
#pragma once
#include <pybind11/pybind11.h>

#include <vector>

namespace gdd_fast {

using Binder = void (*)(pybind11::module_&);

inline std::vector<Binder>& binders() {
  static std::vector<Binder> all;
  return all;
}

// A static object of this type makes module.cpp call `binder` when the module is created.
struct Bind {
  explicit Bind(Binder binder) { binders().push_back(binder); }
};

}  // namespace gdd_fast
