// exp of the position filter of one image, computed where it is used: that is faster than to read it from memory.
// With `renormalise` the largest entry of each column (gather) or row (scatter) is 1: the factors cancel, and a narrow
// filter on a coarse grid does not underflow to columns of zeros.

#pragma once

#include <algorithm>

#include "tokens.h"

namespace setformer {

template <class T>
class Filter {
 public:
  explicit Filter(const Call& call)
      : call_(call),
        n_(padded(call.tokens)),
        m_(padded(call.references)),
        places_(call.axes * m_),
        positions_(call.axes * n_),
        gather_columns_(m_),
        scatter_columns_(m_),
        gather_rows_(n_),
        scatter_rows_(n_) {
    const T* places = static_cast<const T*>(call.places);
    std::fill_n(places_ + 0, call.axes * m_, T(0));
    for (long j = 0; j < m_; ++j) {
      scatter_columns_[j] = j < call.references ? T(0) : NOWHERE;
      for (long axis = 0; j < call.references && axis < call.axes; ++axis) {
        places_[axis * m_ + j] = places[j * call.axes + axis] / T(call.tau);
      }
    }
  }

  void prepare(long image) {
    const bool own = call_.own_places || call_.mask;
    if (image_ == image || (image_ >= 0 && !own)) return;
    image_ = image;
    const long skipped = call_.own_places ? image * call_.tokens : 0;
    const T* places = static_cast<const T*>(call_.positions) + skipped * call_.axes;
    const uint8_t* mask = call_.mask ? call_.mask + image * call_.tokens : nullptr;
    for (long i = 0; i < n_; ++i) {
      const long token = std::min(i, call_.tokens - 1);
      for (long axis = 0; axis < call_.axes; ++axis) {
        positions_[axis * n_ + i] = places[token * call_.axes + axis] / T(call_.tau);
      }
      gather_rows_[i] = i < call_.tokens && (!mask || mask[i]) ? T(0) : NOWHERE;
      scatter_rows_[i] = T(0);
    }
    std::copy_n(scatter_columns_ + 0, m_, gather_columns_ + 0);
    if (call_.renormalise) find_largest();
  }

  // out = K times the filter, for a tile.
  void gather(const T* kernel, Tile tile, T* out) const { choose(kernel, tile, gather_rows_, gather_columns_, out); }
  void scatter(const T* kernel, Tile tile, T* out) const { choose(kernel, tile, scatter_rows_, scatter_columns_, out); }

 private:
  static constexpr int L = LANES<T>;
  static constexpr T NOWHERE = -1e30;

  // -|p_i - q_j|^2 / tau^2 for L references from j on, and more. AXES: their number, 0 where it is not known here.
  template <int AXES = 0>
  Vector<T> logarithm(long i, long j, Vector<T> more) const {
    const long axes = AXES ? AXES : call_.axes;
    for (long axis = 0; axis < axes; ++axis) {
      const Vector<T> apart = vec(places_ + axis * m_ + j) - positions_[axis * n_ + i];
      more -= apart * apart;
    }
    return more;
  }

  void choose(const T* kernel, Tile tile, const T* rows, const T* columns, T* out) const {
    switch (call_.axes) {
      case 1: apply<1>(kernel, tile, rows, columns, out); break;
      case 2: apply<2>(kernel, tile, rows, columns, out); break;
      default: apply<0>(kernel, tile, rows, columns, out); break;
    }
  }

  template <int AXES>
  void apply(const T* kernel, Tile tile, const T* rows, const T* columns, T* out) const {
    for (long t = 0; t < tile.rows; ++t) {
      const long i = tile.first + t;
      for (long j = 0; j < m_; j += L) {
        const Vector<T> log = logarithm<AXES>(i, j, vec(columns + j) + rows[i]);
        vec(out + t * m_ + j) = vec(kernel + t * m_ + j) * exponential<T>(log);
      }
    }
  }

  void find_largest() {
    Array<T> highest(m_);
    std::fill_n(highest + 0, m_, NOWHERE);
    for (long first = 0; first < n_; first += L) {
      Vector<T> nearest[L];
      std::fill_n(nearest, L, Vector<T>{} + NOWHERE);
      for (long j = 0; j < m_; j += L) {
        for (int r = 0; r < L; ++r) {
          const Vector<T> log = logarithm(first + r, j, vec(scatter_columns_ + j));
          nearest[r] = larger<T>(nearest[r], log);
          vec(highest + j) = larger<T>(vec(highest + j), log + gather_rows_[first + r]);
        }
      }
      vec(scatter_rows_ + first) = -joined<T>(nearest, larger<T>);
    }
    for (long j = 0; j < call_.references; ++j) gather_columns_[j] = -highest[j];
  }

  const Call& call_;
  const long n_, m_;
  long image_ = -1;
  Array<T> places_, positions_;  // (axes, m), (axes, n), over tau
  Array<T> gather_columns_, scatter_columns_, gather_rows_, scatter_rows_;  // added to the logarithm
};

}  // namespace setformer
