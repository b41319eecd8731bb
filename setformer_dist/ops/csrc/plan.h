// The transport plan alone (transport_plan of sinkhorn.py): similarities in, the plan and the v of every round out.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "tokens.h"
#include "vectors.h"

namespace setformer {

template <class T>
class Plans {
 public:
  Plans(long n, long m, long rounds, double epsilon)
      : n_(n), m_(m), width_(padded(m)), rounds_(rounds), scale_(T(1.0 / epsilon)), kernel_(padded(n) * width_),
        u_(padded(n)), v_(width_), columns_(width_) {}

  // similarity, plan: (n, m); scalings: (rounds + 1, m).
  void solve(const T* similarity, T* scalings, T* plan) {
    std::fill_n(v_ + 0, width_, T(0));
    std::fill_n(v_ + 0, m_, T(1));
    std::copy_n(v_ + 0, m_, scalings);
    exponentials(similarity, plan);
    for (long round = 1; round <= rounds_; ++round) {
      std::fill_n(columns_ + 0, width_, T(0));
      for_tiles(n_, [&](Tile tile) {
        T* kernel = kernel_ + tile.first * width_;
        if (round == 1) spread(plan, tile, kernel);
        half_round(tile, kernel);
      });
      for (long j = 0; j < m_; ++j) v_[j] = (T(1) / T(m_)) / columns_[j];
      std::copy_n(v_ + 0, m_, scalings + round * m_);
    }
    for (long i = 0; i < n_; ++i) {
      T* row = plan + i * m_;
      const T u = u_[i];
      long j = 0;
      for (; j + L <= m_; j += L) any(row + j) *= vec(v_ + j) * u;
      for (; j < m_; ++j) row[j] *= u * v_[j];
    }
  }

 private:
  static constexpr int L = LANES<T>;

  // A vector that begins anywhere.
  static typename Vectors<T>::Unaligned& any(T* place) {
    return *reinterpret_cast<typename Vectors<T>::Unaligned*>(place);
  }

  // K, row behind row without gaps: filled up, a third of the exponentials would be of nothing at m = 49.
  void exponentials(const T* similarity, T* out) {
    const long count = n_ * m_;
    long i = 0;
    for (; i + L <= count; i += L) {
      const Vector<T> s = *reinterpret_cast<const typename Vectors<T>::Unaligned*>(similarity + i);
      any(out + i) = exponential<T>(s * scale_);
    }
    Vector<T> rest = {};
    for (long j = 0; i + j < count; ++j) rest[j] = similarity[i + j] * scale_;
    rest = exponential<T>(rest);
    for (long j = 0; i + j < count; ++j) out[i + j] = rest[j];
  }

  // The rows of a tile as the loops need them; tokens and references that only fill up get 0.
  void spread(const T* dense, Tile tile, T* kernel) {
    for (long t = 0; t < tile.rows; ++t) {
      T* row = kernel + t * width_;
      if (t >= tile.count) {
        std::fill_n(row, width_, T(0));
        continue;
      }
      copy_row(dense + (tile.first + t) * m_, m_, row);
      for (long j = m_; j < width_; ++j) row[j] = T(0);
    }
  }

  // u of a tile's tokens, and what they add to the sums of the columns.
  void half_round(Tile tile, const T* kernel) {
    T* u = u_ + tile.first;
    dot_row<T>(kernel, width_, v_, tile.rows, width_, u);
    for (long t = 0; t < tile.rows; ++t) u[t] = t < tile.count ? (T(1) / T(n_)) / u[t] : T(0);
    add_rows<T>(kernel, width_, u, tile.rows, width_, columns_);
  }

  long n_, m_, width_, rounds_;
  T scale_;
  Array<T> kernel_, u_, v_, columns_;
};

template <class T>
void plans(
    const T* similarity, long problems, long n, long m, long rounds, double epsilon, T* scalings, T* plan) {
  at::parallel_for(0, problems, 1, [&](long first, long last) {
    Plans<T> solver(n, m, rounds, epsilon);
    for (long z = first; z < last; ++z) {
      solver.solve(similarity + z * n * m, scalings + z * (rounds + 1) * m, plan + z * n * m);
    }
  });
}

}  // namespace setformer
