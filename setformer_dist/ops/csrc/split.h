// SeT attention of tokens that are a part of each image, pass by pass; ops/set/split_cpp.py sums over the ranks between
// them. All heads of all images make a pass together, because their sums travel together.
//
//   ROUND              u = a / (K v) and its sums u K, of both sets; in the last round also the sums N and P
//   SCATTER            pooled to tokens
//   SCATTER_BACKWARD   the sums (K_t F)^T e and the column sums of direct_t; 1 / (K_t v) of all rounds
//   GATHER_BACKWARD    df of the gathering set; the sums x K of the last round, of both sets; 1 / (K_g v) of all rounds
//   ROUND_BACKWARD     those of the rounds before
//   TOKENS_BACKWARD    the first round, and the gradients of tokens and references
//
// The implicit gradient (sinkhorn.implicit_adjoint) sees the last round alone: L = 1, and v of the last two rounds.
//
//   IMPLICIT_SYSTEM    column sums of the plan P, and P^T (P 1)^-1 P
//   IMPLICIT_SIDE      P^T (P 1)^-1 df, of what GATHER_BACKWARD has left
//   IMPLICIT_TOKENS    the gradients of tokens and references
//
// K of as many heads as the caller has memory for stays there; of the others each pass computes it again, tile by tile.
// Nothing else grows with tokens times references: `direct` is computed twice.

#pragma once

#include <vector>

#include "head.h"

namespace setformer {

template <class T>
void Head<T>::part(Pass pass, long image, long head) {
  begin(image, head);
  switch (pass) {
    case ROUND: return part_round();
    case SCATTER: return part_scatter();
    case SCATTER_BACKWARD: return part_scatter_backward();
    case GATHER_BACKWARD: return part_gather_backward();
    case ROUND_BACKWARD: return part_round_backward();
    case TOKENS_BACKWARD: return part_tokens_backward();
    case IMPLICIT_SYSTEM: return part_implicit_system();
    case IMPLICIT_SIDE: return part_implicit_side();
    case IMPLICIT_TOKENS: return part_tokens_backward(true);
  }
}

// Find this head's K and rows of a set. Heads that keep K lie evenly among all, so that threads have equal work.
template <class T>
Plan<T>& Head<T>::part_plan(long set, bool reads_references) {
  Plan<T>& plan = plans_[set];
  const long heads = call_.images * call_.heads, index = image_ * call_.heads + head_, kept = part_->kept;
  const long place = index * kept / heads;
  const bool keeps = (index + 1) * kept / heads > place;
  plan.kernel = keeps ? static_cast<T*>(part_->kernels) + (set * kept + place) * n_ * m_ : nullptr;
  start(plan);
  read_scalings(plan);
  if (reads_references || !keeps) read_references(plan);
  if (!part_->rows) return plan;
  plan.inverse_kv = of_head(part_->rows, (2 * call_.rounds + 1) * n_, set);
  plan.x = plan.inverse_kv + call_.rounds * n_;
  plan.df = plan.x + call_.rounds * n_;
  return plan;
}

// Copy rows between a tensor and memory that is padded; what pads is 0.
template <class T>
void pad_rows(const T* from, long rows, long width, T* to, long padded_rows, long stride) {
  std::fill_n(to, padded_rows * stride, T(0));
  for (long r = 0; r < rows; ++r) std::copy_n(from + r * width, width, to + r * stride);
}

template <class T>
void unpad_rows(const T* from, long stride, long rows, long width, T* to) {
  for (long r = 0; r < rows; ++r) std::copy_n(from + r * stride, width, to + r * width);
}

template <class T>
void Head<T>::read_pooled() {
  const long m = call_.references, d = call_.values;
  pad_rows<T>(of_head(part_->pooled, m * d), m, d, pooled_, m_, d_);
}

template <class T>
void Head<T>::read_grad_pooled() {
  const long m = call_.references, d = call_.values;
  pad_rows<T>(of_head(part_->grad_pooled, m * d), m, d, grad_pooled_, m_, d_);
  pad_rows<T>(of_head(part_->along, m), 1, m, along_pooled_, 1, m_);
  transpose<T>(grad_pooled_, m_, d_, grad_pooled_transposed_);
}

// y of a round on its way back, and v before that round.
template <class T>
T* Head<T>::read_round(const Plan<T>& plan, long round) {
  const long m = call_.references;
  T* y = right_[plan.set] + 2 * (round - 1) * m_;
  pad_rows<T>(of_head(part_->y, call_.rounds * m, plan.set) + (round - 1) * m, 1, m, y, 1, m_);
  std::copy_n(plan.v + (round - 1) * m_, m_, y + m_);
  return y;
}

template <class T>
void Head<T>::write_columns(const Plan<T>& plan, const T* sums) {
  const long m = call_.references;
  if (part_->columns[plan.set]) std::copy_n(sums, m, of_head(part_->columns[plan.set], m));
}

template <class T>
void Head<T>::part_round() {
  const long m = call_.references, d = call_.values;
  for (long set = 0; set < (call_.two_sets ? 2 : 1); ++set) {
    const bool gathers = set == 0 && part_->round == call_.rounds;
    Plan<T>& plan = part_plan(set, part_->round == 1);
    round(plan, part_->round, gathers);
    write_columns(plan, columns_);
    if (!gathers) continue;
    unpad_rows<T>(pooled_, d_, m, d, of_head(part_->pooled, m * d));
    if (part_->pooled_sums) std::copy_n(pooled_sums_ + 0, m, of_head(part_->pooled_sums, m));
  }
}

template <class T>
void Head<T>::part_scatter() {
  read_pooled();
  scatter(part_plan(back().set));
}

template <class T>
void Head<T>::part_scatter_backward() {
  const long m = call_.references, d = call_.values;
  const Plan<T>& plan = part_plan(back().set, true);
  read_pooled();
  begin_scatter_backward(plan);
  for_tiles(call_.tokens, [&](Tile tile) {
    const T* kernel = new_kernel(plan, tile);
    invert_rows(plan, kernel, tile);
    scatter_backward(plan, kernel, tile, direct_tile_, true);
  });
  unpad_rows<T>(grad_pooled_, d_, m, d, of_head(part_->grad_pooled, m * d));
  write_columns(plan, plan.dg);
}

template <class T>
void Head<T>::part_gather_backward() {
  const bool two_sets = call_.two_sets;
  const long rounds = call_.rounds;
  const Plan<T>& plan = part_plan(0, two_sets);
  read_grad_pooled();
  std::fill_n(plan.dg, m_, T(0));
  std::fill_n(columns_ + 0, m_, T(0));
  std::fill_n(direct_tile_ + 0, TILE * m_, T(0));
  const T* y = read_round(plan, rounds);
  for_tiles(call_.tokens, [&](Tile tile) {
    const T* kernel = two_sets ? new_kernel(plan, tile) : kernel_of(plan, tile);
    if (two_sets) invert_rows(plan, kernel, tile);
    gather_backward(plan, kernel, tile, direct_tile_, !two_sets);
    row_gradients(plan, kernel, tile, rounds, y);
    add_rows<T>(kernel, m_, plan.x + (rounds - 1) * n_ + tile.first, tile.rows, m_, columns_);
  });
  write_columns(plan, columns_);
  if (!two_sets) return;
  const Plan<T>& other = part_plan(1);
  round_backward(other, rounds, read_round(other, rounds));
  write_columns(other, columns_);
}

template <class T>
void Head<T>::part_round_backward() {
  for (long set = 0; set < (call_.two_sets ? 2 : 1); ++set) {
    const Plan<T>& plan = part_plan(set);
    round_backward(plan, part_->round, read_round(plan, part_->round));
    write_columns(plan, columns_);
  }
}

template <class T>
void Head<T>::part_tokens_backward(bool implicit) {
  const long sets = call_.two_sets ? 2 : 1;
  for (long set = 0; set < sets; ++set) {
    const Plan<T>& plan = part_plan(set, true);
    for (long l = 1; l <= call_.rounds; ++l) read_round(plan, l);
    if (implicit) std::copy_n(last_v(plan), m_, right_[set] + m_);
    std::fill_n(plan.dg, m_, T(0));
    std::fill_n(grad_references_[set] + 0, m_ * k_, T(0));
  }
  read_pooled();
  begin_scatter_backward(back());
  read_grad_pooled();
  for_tiles(call_.tokens, [&](Tile tile) {
    for (long set = sets - 1; set >= 0; --set) {
      const Plan<T>& plan = plans_[set];
      const T* kernel = kernel_of(plan, tile);
      if (set == sets - 1) scatter_backward(plan, kernel, tile, direct_tile_, false);
      if (set == 0) gather_backward(plan, kernel, tile, direct_tile_, sets == 1);
      T* df = set ? grad_features_ : output_;
      implicit ? implicit_backward(plan, kernel, tile, direct_tile_, df)
               : plan_backward(plan, kernel, tile, direct_tile_, df);
      if (set == 0) features_backward(plan, kernel, tile, grad_features_);
    }
  });
  for (long set = 0; set < sets; ++set) write_references(plans_[set]);
}

// ---------------------------------------------------------------------------------------------- implicit gradient

// Do something with each valid row of the plan P and 1 / its sum.
template <class T>
template <class Body>
void Head<T>::for_plan_rows(const Plan<T>& plan, const T* kernel, Tile tile, const Body& body) {
  const long m = call_.references;
  const T* v = last_v(plan);
  dot_row<T>(kernel, m_, plan.v, tile.rows, m_, u_);
  std::vector<double> row(m);
  for (long t = 0; t < tile.count; ++t) {
    const T a = row_sums_[tile.first + t], u = a / u_[t];
    if (a == 0) continue;
    double sum = 0;
    for (long j = 0; j < m; ++j) sum += row[j] = kernel[t * m_ + j] * u * v[j];
    body(tile.first + t, row.data(), 1 / sum);
  }
}

template <class T>
void Head<T>::part_implicit_system() {
  const long m = call_.references;
  for (long set = 0; set < (call_.two_sets ? 2 : 1); ++set) {
    const Plan<T>& plan = part_plan(set, true);
    double *columns = of_head(part_->system, m, set), *gram = of_head(part_->gram, m * m, set);
    std::fill_n(columns, m, 0.0);
    std::fill_n(gram, m * m, 0.0);
    for_tiles(call_.tokens, [&](Tile tile) {
      for_plan_rows(plan, new_kernel(plan, tile), tile, [&](long, const double* row, double inverse) {
        for (long j = 0; j < m; ++j) {
          const double weighted = row[j] * inverse;
          columns[j] += row[j];
          for (long l = j; l < m; ++l) gram[j * m + l] += weighted * row[l];
        }
      });
    });
    for (long j = 0; j < m; ++j) {
      for (long l = 0; l < j; ++l) gram[j * m + l] = gram[l * m + j];
    }
  }
}

template <class T>
void Head<T>::part_implicit_side() {
  const long m = call_.references;
  for (long set = 0; set < (call_.two_sets ? 2 : 1); ++set) {
    const Plan<T>& plan = part_plan(set, true);
    double* side = of_head(part_->side, m, set);
    std::fill_n(side, m, 0.0);
    for_tiles(call_.tokens, [&](Tile tile) {
      for_plan_rows(plan, kernel_of(plan, tile), tile, [&](long i, const double* row, double inverse) {
        const double weight = plan.df[i] * inverse;
        for (long j = 0; j < m; ++j) side[j] += weight * row[j];
      });
    });
  }
}

// As plan_backward, with x = (df - u K y) / (K v) where v is the last one, as u is.
template <class T>
void Head<T>::implicit_backward(const Plan<T>& plan, const T* kernel, Tile tile, const T* direct, T* df) {
  const T *inverse = plan.inverse_kv + tile.first, *a = row_sums_ + tile.first;
  T* x = plan.x + tile.first;
  dot_row<T>(kernel, m_, right_[plan.set], tile.rows, m_, sums_);
  dot_row<T>(kernel, m_, last_v(plan), tile.rows, m_, u_);
  for (long t = 0; t < tile.rows; t += L) {
    vec(x + t) = (vec(plan.df + tile.first + t) - vec(a + t) * vec(inverse + t) * vec(sums_ + t)) / vec(u_ + t);
  }
  similarity_backward(plan, kernel, direct, tile);
  multiply<T>(ds_, m_, 1, plan.references, k_, tile.rows, call_.references, k_, df, k_);
  accumulate<T>(ds_, m_, features_, k_, tile.rows, m_rows_, k_, grad_references_[plan.set], k_);
}

}  // namespace setformer
