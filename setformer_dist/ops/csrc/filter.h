// exp of the position filter of one image, computed where it is used: that is faster than to read it from memory.
// With `renormalise` the largest entry of each column (gather) or row (scatter) is 1: the factors cancel, and a narrow
// filter on a coarse grid does not underflow to columns of zeros.
//
// On a grid the filter is a product of one of a token's column and one of its row: the first comes from a table that
// stays in the caches, the second changes once per row of the grid, and no exponential is left. Where the largest
// entries are so small that such factors could vanish one by one, the logarithms are summed as elsewhere.

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
        scatter_rows_(n_),
        slow_(m_) {
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
    if (call_.renormalise) find_largest(image);
    prepare_grid();
  }

  // out = K times the filter, for a tile.
  void gather(const T* kernel, Tile tile, T* out) const { choose(kernel, tile, gather_rows_, gather_columns_, out); }
  void scatter(const T* kernel, Tile tile, T* out) const { choose(kernel, tile, scatter_rows_, scatter_columns_, out); }

 private:
  static constexpr int L = LANES<T>;
  static constexpr T NOWHERE = -1e30, SAFE = 20;  // e^20 times a factor that vanishes (e^-87) is negligible against 1

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

  // Take the way by factors if the tokens lie on a grid, row behind row, and no factor can vanish that counts.
  void prepare_grid() {
    width_ = 0;
    if (call_.axes != 2) return;
    const T* along = positions_ + n_;
    long width = 1;
    while (width < call_.tokens && along[width] != along[0]) ++width;
    for (long i = width; i < call_.tokens; ++i) {
      if (along[i] != along[i - width]) return;
    }
    for (long i = 0; i < n_; ++i) {
      if (std::max(gather_rows_[i], scatter_rows_[i]) > SAFE) return;
    }
    for (long j = 0; j < m_; ++j) {
      if (std::max(gather_columns_[j], scatter_columns_[j]) > SAFE) return;
    }
    if (width > capacity_) fast_ = Array<T>((capacity_ = width) * m_);
    for (long p = 0; p < width; ++p) {
      for (long j = 0; j < m_; j += L) {
        const Vector<T> apart = vec(places_ + m_ + j) - along[p];
        vec(fast_ + p * m_ + j) = exponential<T>(-apart * apart);
      }
    }
    for (T* rows : {gather_rows_ + 0, scatter_rows_ + 0}) {
      for (long i = 0; i < n_; i += L) vec(rows + i) = exponential<T>(vec(rows + i));
    }
    width_ = width;
  }

  // The filter as a product: rows are factors here.
  void apply_grid(const T* kernel, Tile tile, const T* rows, const T* columns, T* out) const {
    for (long t = 0; t < tile.rows; ++t) {
      const long i = tile.first + t;
      if (t == 0 || positions_[i] != positions_[i - 1]) {
        for (long j = 0; j < m_; j += L) {
          const Vector<T> apart = vec(places_ + j) - positions_[i];
          vec(slow_ + j) = exponential<T>(vec(columns + j) - apart * apart);
        }
      }
      const T* fast = fast_ + i % width_ * m_;
      for (long j = 0; j < m_; j += L) {
        vec(out + t * m_ + j) = vec(kernel + t * m_ + j) * (vec(fast + j) * (vec(slow_ + j) * rows[i]));
      }
    }
  }

  void choose(const T* kernel, Tile tile, const T* rows, const T* columns, T* out) const {
    if (width_) return apply_grid(kernel, tile, rows, columns, out);
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

  void find_largest(long image) {
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
    const T* given = static_cast<const T*>(call_.nearest);
    if (given && (call_.own_places || call_.mask)) given += image * call_.references;
    for (long j = 0; j < call_.references; ++j) gather_columns_[j] = -(given ? given[j] : highest[j]);
  }

  const Call& call_;
  const long n_, m_;
  long image_ = -1, width_ = 0, capacity_ = 0;  // width_: of the grid, 0 where the logarithms are summed
  Array<T> places_, positions_;  // (axes, m), (axes, n), over tau
  Array<T> gather_columns_, scatter_columns_, gather_rows_, scatter_rows_;  // added to the logarithm
  Array<T> fast_, slow_;  // (width, m) of the columns of the grid, (m) of the present row
};

}  // namespace setformer
