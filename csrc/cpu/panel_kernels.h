// The inner loops of small maps for one instruction set; panels.cpp includes this by cpu/vector_sets.h.

using Vector = GDD_FAST_VECTOR;
constexpr int64_t kVector = sizeof(Vector) / sizeof(float);
constexpr int64_t kRows = GDD_FAST_EITHER(8, 6);  // of a product kept in registers, two vectors each

// sums[r, :] = sum over taps t and k of t.rows[r][k] * t.weight[k, :], for a panel `Vectors` vectors wide.
template <int64_t Rows, int64_t Vectors>
GDD_FAST_ISA void multiply_rows(const Tap* taps, int64_t count, float* to) {
  Vector sums[Rows][Vectors];
#pragma GCC unroll 16
  for (int64_t r = 0; r < Rows; r++) {
    for (int64_t v = 0; v < Vectors; v++) sums[r][v] = GDD_FAST_MM(setzero_ps)();
  }
  for (const Tap* tap = taps; tap != taps + count; tap++) {
    const float* rows[Rows];
#pragma GCC unroll 16
    for (int64_t r = 0; r < Rows; r++) rows[r] = tap->rows[r];
    const float* w = tap->weight;
    for (int64_t k = 0; k < tap->depth; k++, w += Vectors * kVector) {
      Vector weights[Vectors];
#pragma GCC unroll 2
      for (int64_t v = 0; v < Vectors; v++) weights[v] = GDD_FAST_MM(loadu_ps)(w + v * kVector);
#pragma GCC unroll 16
      for (int64_t r = 0; r < Rows; r++) {
        const Vector value = GDD_FAST_MM(set1_ps)(rows[r][k]);
#pragma GCC unroll 2
        for (int64_t v = 0; v < Vectors; v++) sums[r][v] = GDD_FAST_MM(fmadd_ps)(value, weights[v], sums[r][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int64_t r = 0; r < Rows; r++) {
    for (int64_t v = 0; v < Vectors; v++) GDD_FAST_MM(storeu_ps)(to + (r * Vectors + v) * kVector, sums[r][v]);
  }
}

// For 1 to kRows rows.
template <int64_t Vectors, int64_t Rows = kRows>
GDD_FAST_ISA void multiply(int64_t rows, const Tap* taps, int64_t count, float* to) {
  if constexpr (Rows > 0) {
    if (rows == Rows) {
      multiply_rows<Rows, Vectors>(taps, count, to);
    } else {
      multiply<Vectors, Rows - 1>(rows, taps, count, to);
    }
  }
}
