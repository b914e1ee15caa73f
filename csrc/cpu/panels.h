// Products of a few rows, anywhere in memory, with panels of a weight.
#pragma once
#include <cstdint>

namespace gdd_fast::cpu {

constexpr int64_t kMostRows = 8, kWidestPanel = 32;

// Rows of one depth and the part of a panel that multiplies them, which starts `at` rows below the panel's first.
struct Tap {
  const float* rows[kMostRows];
  const float* weight;
  int64_t depth, at;
};

// to[r, :] = the sum over taps and k of tap.rows[r][k] * tap.weight[k, :]; 1 to `rows` rows.
using Multiply = void (*)(int64_t rows, const Tap* taps, int64_t count, float* to);

// The kernels for this processor, as torch sees it; 0 and null if there are none.
struct Panels {
  int64_t width = 0, narrow = 0, rows = 0;
  Multiply multiply = nullptr, multiply_narrow = nullptr;
};

const Panels& panels();

}  // namespace gdd_fast::cpu
