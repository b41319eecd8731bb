// SeT attention of one head of one image, forward and backward (ops/set/in_torch.py has the mathematics): of a whole
// image here, pass by pass of a part of its tokens in split.h.
//
// A head's tokens pass in tiles that stay in the nearest cache; a pass does all that can be done while its tile is
// there: both halves of a Sinkhorn round, and gathering in the last one. K = exp(s / epsilon) is kept between passes,
// the plan never is. Per thread: in the forward one n x m matrix, in the backward two, three with two reference sets.
// Of a part, K may also be computed again in each pass: then there is no n x m matrix at all.
// Rows beyond n and columns beyond m fill up to multiples of PAD: such tokens have row sums of 0 like masked ones,
// such references have v = 0. References come with any length: what lies below SMALLEST is divided by its root.
//
// Letters: n = tokens, m = references, k = features, d = values, L = rounds; u, v, a as in sinkhorn.py.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "filter.h"
#include "tokens.h"
#include "vectors.h"

namespace setformer {

// Squares of lengths are taken to be at least this, here and in `unit` of kernels.py.
constexpr double SMALLEST = 1e-12;

template <class T>
T squared_length(const T* vector, long size) {
  T square = 0;
  for (long p = 0; p < size; ++p) square += vector[p] * vector[p];
  return square;
}

// One reference set of one head and its transport plan.
template <class T>
struct Plan {
  long set;
  const T* given;        // (m, k), of any length
  T* scalings;           // (L + 1, m), where the caller keeps them
  T* kernel;             // (n, m), or nothing where K of a tile is computed whenever it is needed
  Array<T> references;   // (m, k), of unit length
  Array<T> transposed;   // (k, m)
  Array<T> v;            // (L + 1, m), padded with 0
  // The backward's: 1 / (K v) before each round, x of each round (L, n), gradients of f = log u (n) and g = log v (m).
  T *inverse_kv, *x, *df, *dg;
};

template <class T>
class Head {
 public:
  // `part`: what else is known where the tokens are a part of the images.
  Head(const Call& call, bool backward, const Part* part = nullptr);
  void forward(long image, long head);
  void backward(long image, long head);

  void part(Pass pass, long image, long head);  // split.h

 private:
  static constexpr int L = LANES<T>;
  static constexpr T TINY = std::numeric_limits<T>::min();

  void take_memory(bool backward);
  void begin(long image, long head);
  void start(Plan<T>& plan);
  void read_references(Plan<T>& plan);
  void read_scalings(Plan<T>& plan);
  void solve(Plan<T>& plan, bool gathers);
  void round(Plan<T>& plan, long round, bool gathers);
  void revisit(Plan<T>& plan, bool gathers);
  void invert_rows(const Plan<T>& plan, const T* kernel, Tile tile);
  void read_features(Tile tile);
  void similarity(const Plan<T>& plan, Tile tile, T* out, bool only_similarity = false);
  const T* new_kernel(const Plan<T>& plan, Tile tile);
  const T* kernel_of(const Plan<T>& plan, Tile tile);
  const T* gather_weights(const T* kernel, Tile tile);
  const T* scatter_weights(const T* kernel, Tile tile);
  void gather(const T* kernel, Tile tile, const T* u);
  void begin_gathering();
  void finish_gathering(const Plan<T>& plan);
  void weigh_pooled(const T* v);
  void scatter(const Plan<T>& plan);
  void begin_scatter_backward(const Plan<T>& plan);
  void scatter_backward(const Plan<T>& plan, const T* kernel, Tile tile, T* direct, bool pools);
  void pooled_backward(const T* v);
  void gather_backward(const Plan<T>& plan, const T* kernel, Tile tile, T* direct, bool adds);
  void rounds_backward(Plan<T>& plan);
  void round_backward(const Plan<T>& plan, long round, const T* y);
  void plan_backward(const Plan<T>& plan, const T* kernel, Tile tile, const T* direct, T* df);
  void write_references(const Plan<T>& plan);
  void row_gradients(const Plan<T>& plan, const T* kernel, Tile tile, long round, const T* y);
  void similarity_backward(const Plan<T>& plan, const T* kernel, const T* direct, Tile tile);
  void features_backward(const Plan<T>& plan, const T* kernel, Tile tile, const T* other);

  // Passes over a part, and what they share.
  void part_round();
  void part_scatter();
  void part_scatter_backward();
  void part_gather_backward();
  void part_round_backward();
  void part_tokens_backward(bool implicit = false);
  void part_implicit_system();
  void part_implicit_side();
  void implicit_backward(const Plan<T>& plan, const T* kernel, Tile tile, const T* direct, T* df);
  template <class Body>
  void for_plan_rows(const Plan<T>& plan, const T* kernel, Tile tile, const Body& body);
  Plan<T>& part_plan(long set, bool reads_references = false);
  void read_pooled();
  void read_grad_pooled();
  T* read_round(const Plan<T>& plan, long round);
  void write_columns(const Plan<T>& plan, const T* sums);

  // This head's numbers in a tensor (sets, b, h, size).
  double* of_head(double* tensor, long size, long set = 0) const {
    return tensor + ((set * call_.images + image_) * call_.heads + head_) * size;
  }
  T* of_head(void* tensor, long size, long set = 0) const {
    return static_cast<T*>(tensor) + ((set * call_.images + image_) * call_.heads + head_) * size;
  }
  T* tile_of(T* matrix, Tile tile) const { return matrix + tile.first * m_; }
  T* last_v(const Plan<T>& plan) const { return plan.v + call_.rounds * m_; }
  T* last_inverse_kv(const Plan<T>& plan) const { return plan.inverse_kv + (call_.rounds - 1) * n_; }
  Plan<T>& back() { return plans_[call_.two_sets ? 1 : 0]; }

  const Call& call_;
  const Part* const part_;
  const long n_, m_, k_, d_, m_rows_;  // padded; m_rows_: references padded as little as rows of a block need
  long image_ = 0, head_ = 0;
  std::unique_ptr<Filter<T>> filter_;

  Plan<T> plans_[2];
  Array<T> kernels_[2], inverse_kv_[2], df_[2], dg_[2], x_;
  Array<T> row_sums_, inverse_length_;                    // (n): a, 1 / |x|
  Array<T> values_, features_, output_;                   // one tile each: x, f, (k or d) ...
  Array<T> weights_, tile_, ds_, kernel_, direct_tile_;   // ... and of its references: W, any, ds, K, direct
  Array<T> u_, sums_, zeros_, ones_;                      // numbers of a tile's tokens; 1 for real references
  Array<T> columns_, pooled_sums_, pooled_, pooled_v_;    // (m), (m), (m, d), (m, d)

  // Of the backward: gradients of s / epsilon (n, m) and of features (n, k) ...
  Array<T> direct_, grad_features_;
  // ... what weighs each reference on its way back, and u and x, y and v of each round.
  Array<T> pooled_v_transposed_, grad_pooled_, grad_pooled_transposed_, along_pooled_, left_, right_[2];
  Array<T> grad_references_[2];
};

template <class T>
Head<T>::Head(const Call& call, bool backward, const Part* part)
    : call_(call),
      part_(part),
      n_(padded(call.tokens)),
      m_(padded(call.references)),
      k_(padded(call.features)),
      d_(padded(call.values)),
      m_rows_((call.references + 7) / 8 * 8),
      filter_(call.axes ? std::make_unique<Filter<T>>(call) : nullptr) {
  const long rounds = call.rounds;
  for (long set = 0; set < (call.two_sets ? 2 : 1); ++set) {
    Plan<T>& plan = plans_[set];
    plan.set = set;
    plan.references = Array<T>(m_ * k_);
    plan.transposed = Array<T>(k_ * m_);
    plan.v = Array<T>((rounds + 1) * m_);
    if (!backward) continue;
    plan.dg = dg_[set] = Array<T>(m_);
    right_[set] = Array<T>(2 * rounds * m_);
    grad_references_[set] = Array<T>(m_ * k_);
  }
  for (Array<T>* tokens : {&row_sums_, &inverse_length_}) *tokens = Array<T>(n_);
  for (Array<T>* numbers : {&u_, &sums_, &zeros_}) *numbers = Array<T>(TILE);
  values_ = Array<T>(TILE * d_);
  features_ = Array<T>(TILE * k_);
  output_ = Array<T>(TILE * std::max(k_, d_));
  for (Array<T>* tile : {&weights_, &tile_, &ds_}) *tile = Array<T>(TILE * m_);
  for (Array<T>* row : {&ones_, &columns_, &pooled_sums_}) *row = Array<T>(m_);
  for (Array<T>* matrix : {&pooled_, &pooled_v_}) *matrix = Array<T>(m_ * d_);
  for (long j = 0; j < m_; ++j) ones_[j] = j < call.references;
  std::fill_n(zeros_ + 0, TILE, T(0));
  if (backward) {
    along_pooled_ = Array<T>(m_);
    for (Array<T>* matrix : {&pooled_v_transposed_, &grad_pooled_, &grad_pooled_transposed_}) {
      *matrix = Array<T>(m_ * d_);
    }
    left_ = Array<T>(2 * rounds * TILE);
  }
  take_memory(backward);
}

// What grows with the tokens; of a part, the caller holds it.
template <class T>
void Head<T>::take_memory(bool backward) {
  if (part_) {
    for (Array<T>* tile : {&kernel_, &direct_tile_}) *tile = Array<T>(TILE * m_);
    grad_features_ = Array<T>(TILE * k_);
    return;
  }
  if (backward) {
    direct_ = Array<T>(n_ * m_);
    grad_features_ = Array<T>(call_.two_sets ? n_ * k_ : 0);
    x_ = Array<T>(call_.rounds * n_);
  }
  for (long set = 0; set < (call_.two_sets ? 2 : 1); ++set) {
    Plan<T>& plan = plans_[set];
    // In the forward the second set begins when the first is done: one matrix serves both.
    if (set == 0 || backward) kernels_[set] = Array<T>(n_ * m_);
    plan.kernel = kernels_[backward ? set : 0];
    if (!backward) continue;
    plan.inverse_kv = inverse_kv_[set] = Array<T>(call_.rounds * n_);
    plan.df = df_[set] = Array<T>(n_);
    plan.x = x_;
  }
}

template <class T>
void Head<T>::begin(long image, long head) {
  image_ = image;
  head_ = head;
  const uint8_t* mask = call_.mask ? call_.mask + image * call_.tokens : nullptr;
  const long own = mask ? std::count_if(mask, mask + call_.tokens, [](uint8_t m) { return m != 0; }) : call_.tokens;
  const long valid = call_.valid ? call_.valid[image] : own;
  for (long i = 0; i < n_; ++i) {
    row_sums_[i] = i < call_.tokens && (!mask || mask[i]) ? T(1) / T(valid) : T(0);
  }
  if (filter_) filter_->prepare(image);
}

// Find this head's numbers.
template <class T>
void Head<T>::start(Plan<T>& plan) {
  const long m = call_.references;
  plan.given = static_cast<const T*>(plan.set ? call_.scatter : call_.gather) + head_ * m * call_.features;
  plan.scalings = of_head(call_.scalings, (call_.rounds + 1) * m, plan.set);
  std::fill_n(plan.v + 0, (call_.rounds + 1) * m_, T(0));
}

template <class T>
void Head<T>::read_references(Plan<T>& plan) {
  const long m = call_.references, k = call_.features;
  std::fill_n(plan.references + 0, m_ * k_, T(0));
  std::fill_n(plan.transposed + 0, k_ * m_, T(0));
  for (long j = 0; j < m; ++j) {
    const T* given = plan.given + j * k;
    const T inverse = T(1) / std::sqrt(std::max(squared_length(given, k), T(SMALLEST)));
    for (long p = 0; p < k; ++p) plan.references[j * k_ + p] = plan.transposed[p * m_ + j] = given[p] * inverse;
  }
}

template <class T>
void Head<T>::read_scalings(Plan<T>& plan) {
  for (long round = 0; round <= call_.rounds; ++round) {
    std::copy_n(plan.scalings + round * call_.references, call_.references, plan.v + round * m_);
  }
}

// Features of a tile: given ones, or x of unit length.
template <class T>
void Head<T>::read_features(Tile tile) {
  if (call_.compared.data) {
    read<T>(call_.compared, image_, head_, tile, call_.features, features_);
    return;
  }
  read<T>(call_.x, image_, head_, tile, call_.features, features_);
  T* inverse = inverse_length_ + tile.first;
  dot_rows<T>(features_, features_, k_, tile.rows, k_, inverse);
  for (long t = 0; t < tile.rows; ++t) inverse[t] = T(1) / std::sqrt(std::max(inverse[t], T(SMALLEST)));
  for (long t = 0; t < tile.rows; ++t) {
    for (long c = 0; c < k_; c += L) vec(features_ + t * k_ + c) *= inverse[t];
  }
}

// K of a tile whose features are read, or with `only_similarity` the Gaussian kernel s that K is made of.
template <class T>
void Head<T>::similarity(const Plan<T>& plan, Tile tile, T* out, bool only_similarity) {
  multiply<T>(features_, k_, 1, plan.transposed, m_, tile.rows, call_.features, m_, out, m_);
  const T scale = 1.0 / call_.epsilon, narrow = call_.sigma > 0 ? 1.0 / (call_.sigma * call_.sigma) : 0.0;
  for (long i = 0; i < tile.rows * m_; i += L) {
    Vector<T> s = vec(out + i);
    if (call_.sigma > 0) s = exponential<T>((s - T(1)) * narrow);
    vec(out + i) = only_similarity ? s : exponential<T>(s * scale);
  }
}

// K of a tile that is visited for the first time.
template <class T>
const T* Head<T>::new_kernel(const Plan<T>& plan, Tile tile) {
  T* kernel = plan.kernel ? tile_of(plan.kernel, tile) : kernel_ + 0;
  read_features(tile);
  similarity(plan, tile, kernel);
  return kernel;
}

template <class T>
const T* Head<T>::kernel_of(const Plan<T>& plan, Tile tile) {
  return plan.kernel ? tile_of(plan.kernel, tile) : new_kernel(plan, tile);
}

// K of a tile times the position filter.
template <class T>
const T* Head<T>::gather_weights(const T* kernel, Tile tile) {
  if (!filter_) return kernel;
  filter_->gather(kernel, tile, weights_);
  return weights_;
}

template <class T>
const T* Head<T>::scatter_weights(const T* kernel, Tile tile) {
  if (!filter_) return kernel;
  filter_->scatter(kernel, tile, weights_);
  return weights_;
}

// --------------------------------------------------------------------------------------------------------- forward

template <class T>
void Head<T>::forward(long image, long head) {
  begin(image, head);
  solve(plans_[0], true);
  if (call_.two_sets) solve(plans_[1], false);
  scatter(back());
}

// Run the rounds of Sinkhorn.
template <class T>
void Head<T>::solve(Plan<T>& plan, bool gathers) {
  const long m = call_.references;
  start(plan);
  read_references(plan);
  std::copy_n(ones_ + 0, m_, plan.v + 0);
  std::copy_n(ones_ + 0, m, plan.scalings);
  for (long l = 1; l <= call_.rounds; ++l) {
    T* v = plan.v + l * m_;
    round(plan, l, gathers && l == call_.rounds);
    for (long j = 0; j < m; ++j) v[j] = (T(1) / T(m)) / columns_[j];
    std::copy_n(v, m, plan.scalings + l * m);
  }
  if (gathers) finish_gathering(plan);
}

// Both halves of a round in one pass over K, as far as these tokens go: the sums of u K.
template <class T>
void Head<T>::round(Plan<T>& plan, long round, bool gathers) {
  const T* v_before = plan.v + (round - 1) * m_;
  std::fill_n(columns_ + 0, m_, T(0));
  if (gathers) begin_gathering();
  for_tiles(call_.tokens, [&](Tile tile) {
    const T* kernel = round == 1 ? new_kernel(plan, tile) : kernel_of(plan, tile);
    dot_row<T>(kernel, m_, v_before, tile.rows, m_, u_);
    for (long t = 0; t < tile.rows; t += L) vec(u_ + t) = vec(row_sums_ + tile.first + t) / vec(u_ + t);
    add_rows<T>(kernel, m_, u_, tile.rows, m_, columns_);
    if (gathers) gather(kernel, tile, u_);
  });
}

template <class T>
void Head<T>::begin_gathering() {
  std::fill_n(pooled_ + 0, m_ * d_, T(0));
  std::fill_n(pooled_sums_ + 0, m_, T(0));
}

template <class T>
void Head<T>::gather(const T* kernel, Tile tile, const T* u) {
  read<T>(call_.x, image_, head_, tile, call_.values, values_);
  for (long t = 0; t < tile.rows; ++t) {
    for (long c = 0; c < d_; c += L) vec(values_ + t * d_ + c) *= u[t];
  }
  const T* w = gather_weights(kernel, tile);
  add_rows<T>(w, m_, u, tile.rows, m_, pooled_sums_);
  accumulate<T>(w, m_, values_, d_, tile.rows, m_rows_, d_, pooled_, d_);
}

// Divide by the sums, of which only the factors stay that the backward needs.
template <class T>
void Head<T>::finish_gathering(const Plan<T>& plan) {
  const T* v = last_v(plan);
  for (long j = 0; j < m_; ++j) {
    T& sum = pooled_sums_[j];
    sum = call_.renormalise ? T(1) / std::max(sum, TINY) : v[j] * T(call_.references);
    if (j >= call_.references) sum = T(0);
    for (long c = 0; c < d_; ++c) pooled_[j * d_ + c] = j < call_.references ? pooled_[j * d_ + c] * sum : T(0);
  }
}

template <class T>
void Head<T>::weigh_pooled(const T* v) {
  for (long j = 0; j < m_; ++j) {
    for (long c = 0; c < d_; c += L) vec(pooled_v_ + j * d_ + c) = vec(pooled_ + j * d_ + c) * v[j];
  }
}

template <class T>
void Head<T>::scatter(const Plan<T>& plan) {
  const T* v = last_v(plan);
  weigh_pooled(v);
  for_tiles(call_.tokens, [&](Tile tile) {
    const T* kernel = kernel_of(plan, tile);
    const T* w = scatter_weights(kernel, tile);
    if (call_.renormalise) {
      dot_row<T>(w, m_, v, tile.rows, m_, sums_);
    } else {
      dot_row<T>(kernel, m_, v - m_, tile.rows, m_, sums_);
    }
    multiply<T>(w, m_, 1, pooled_v_, d_, tile.rows, call_.references, d_, output_, d_);
    for (long t = 0; t < tile.rows; ++t) {
      const T inverse = T(1) / std::max(sums_[t], TINY);
      for (long c = 0; c < d_; c += L) vec(output_ + t * d_ + c) *= inverse;
    }
    write<T>(call_.y, image_, head_, tile, call_.values, output_);
  });
}

// -------------------------------------------------------------------------------------------------------- backward

template <class T>
void transpose(const T* from, long rows, long columns, T* to) {
  for (long r = 0; r < rows; ++r) {
    for (long c = 0; c < columns; ++c) to[c * rows + r] = from[r * columns + c];
  }
}

template <class T>
void Head<T>::backward(long image, long head) {
  begin(image, head);
  Plan<T>& front = plans_[0];
  revisit(front, true);
  if (call_.two_sets) revisit(back(), false);
  begin_scatter_backward(back());
  for_tiles(call_.tokens, [&](Tile tile) {
    scatter_backward(back(), tile_of(back().kernel, tile), tile, tile_of(direct_, tile), true);
  });
  pooled_backward(last_v(back()));
  if (call_.two_sets) {
    rounds_backward(back());
    std::fill_n(front.dg, m_, T(0));
  }
  for_tiles(call_.tokens, [&](Tile tile) {
    gather_backward(front, tile_of(front.kernel, tile), tile, tile_of(direct_, tile), !call_.two_sets);
  });
  rounds_backward(front);
}

// Compute K and the rows of all rounds again.
template <class T>
void Head<T>::revisit(Plan<T>& plan, bool gathers) {
  start(plan);
  read_references(plan);
  read_scalings(plan);
  if (gathers) begin_gathering();
  for_tiles(call_.tokens, [&](Tile tile) {
    const T* kernel = new_kernel(plan, tile);
    invert_rows(plan, kernel, tile);
    if (!gathers) return;
    const T* inverse = last_inverse_kv(plan) + tile.first;
    for (long t = 0; t < tile.rows; t += L) vec(u_ + t) = vec(row_sums_ + tile.first + t) * vec(inverse + t);
    gather(kernel, tile, u_);
  });
  if (gathers) finish_gathering(plan);
}

template <class T>
void Head<T>::invert_rows(const Plan<T>& plan, const T* kernel, Tile tile) {
  for (long round = 0; round < call_.rounds; ++round) {
    T* inverse = plan.inverse_kv + round * n_ + tile.first;
    dot_row<T>(kernel, m_, plan.v + round * m_, tile.rows, m_, inverse);
    for (long t = 0; t < tile.rows; t += L) vec(inverse + t) = T(1) / vec(inverse + t);
  }
}

template <class T>
void Head<T>::begin_scatter_backward(const Plan<T>& plan) {
  weigh_pooled(last_v(plan));
  transpose<T>(pooled_v_, m_, d_, pooled_v_transposed_);
  std::fill_n(grad_pooled_ + 0, m_ * d_, T(0));
  std::fill_n(plan.dg, m_, T(0));
}

// From grad y to the gradients of pooled, of the weights' exponents, and of f and g. With q_ij = dy_i . v_j pooled_j
// and D_i the sum of row i's weights:  direct_ij = W_ij (q_ij / D_i - v_j sum_j W_ij q_ij / D_i^2).
template <class T>
void Head<T>::scatter_backward(const Plan<T>& plan, const T* kernel, Tile tile, T* direct, bool pools) {
  const T *v = last_v(plan), *w = scatter_weights(kernel, tile);
  T* df = plan.df + tile.first;
  read<T>(call_.y, image_, head_, tile, call_.values, values_);
  multiply<T>(values_, d_, 1, pooled_v_transposed_, m_, tile.rows, call_.values, m_, direct, m_);
  if (call_.renormalise) dot_row<T>(w, m_, v, tile.rows, m_, sums_);
  dot_rows<T>(w, direct, m_, tile.rows, m_, u_);
  for (long t = 0; t < tile.rows; ++t) {
    const T inverse = call_.renormalise ? T(1) / std::max(sums_[t], TINY) : last_inverse_kv(plan)[tile.first + t];
    const T along = call_.renormalise ? u_[t] * inverse * inverse : T(0);
    df[t] = call_.renormalise ? T(0) : u_[t] * inverse;
    for (long j = 0; j < m_; j += L) {
      Vector<T>& q = vec(direct + t * m_ + j);
      q = vec(w + t * m_ + j) * (q * inverse - vec(v + j) * along);
      vec(plan.dg + j) += q;
    }
    for (long c = 0; c < d_; c += L) vec(values_ + t * d_ + c) *= inverse;
  }
  if (pools) accumulate<T>(w, m_, values_, d_, tile.rows, m_rows_, d_, grad_pooled_, d_);
}

// From the gradient of pooled to that of the sums before its division, t_j = v_j dpooled_j / N_j.
template <class T>
void Head<T>::pooled_backward(const T* v) {
  for (long j = 0; j < m_; ++j) {
    const T scale = v[j] * pooled_sums_[j];
    T along = 0;
    for (long c = 0; c < d_; ++c) {
      T& t = grad_pooled_[j * d_ + c];
      t = j < call_.references ? t * scale : T(0);
      along += t * pooled_[j * d_ + c];
    }
    along_pooled_[j] = call_.renormalise ? along : T(0);
  }
  transpose<T>(grad_pooled_, m_, d_, grad_pooled_transposed_);
}

// direct_ij = u_i W_ij (x_i . t_j - t_j . pooled_j), on top of what scattering has left where the plan is the same.
template <class T>
void Head<T>::gather_backward(const Plan<T>& plan, const T* kernel, Tile tile, T* direct, bool adds) {
  const T* w = gather_weights(kernel, tile);
  read<T>(call_.x, image_, head_, tile, call_.values, values_);
  multiply<T>(values_, d_, 1, grad_pooled_transposed_, m_, tile.rows, call_.values, m_, tile_, m_);
  for (long t = 0; t < tile.rows; ++t) {
    const T u = row_sums_[tile.first + t] * last_inverse_kv(plan)[tile.first + t];
    for (long j = 0; j < m_; j += L) {
      Vector<T>& q = vec(tile_ + t * m_ + j);
      q = vec(w + t * m_ + j) * u * (q - vec(along_pooled_ + j));
      vec(direct + t * m_ + j) = adds ? vec(direct + t * m_ + j) + q : q;
      if (!call_.renormalise) vec(plan.dg + j) += q;
    }
  }
  T* df = plan.df + tile.first;
  dot_row<T>(tile_, m_, ones_, tile.rows, m_, sums_);
  for (long t = 0; t < tile.rows; t += L) vec(df + t) = adds ? vec(sums_ + t) + vec(df + t) : vec(sums_ + t);
}

// Carry df and dg back through the rounds (sinkhorn.unrolled_adjoint), a pass for each; the last one continues to the
// gradients of references and tokens.
template <class T>
void Head<T>::rounds_backward(Plan<T>& plan) {
  const long m = call_.references;
  for (long round = call_.rounds; round >= 1; --round) {
    T *y = right_[plan.set] + 2 * (round - 1) * m_, *v_before = y + m_;
    for (long j = 0; j < m_; ++j) y[j] = plan.v[round * m_ + j] * plan.dg[j] * T(m);
    std::copy_n(plan.v + (round - 1) * m_, m_, v_before);
    if (round == 1) break;
    round_backward(plan, round, y);
    for (long j = 0; j < m_; ++j) plan.dg[j] = -v_before[j] * columns_[j];
  }
  std::fill_n(grad_references_[plan.set] + 0, m_ * k_, T(0));
  for_tiles(call_.tokens, [&](Tile tile) {
    const T* kernel = tile_of(plan.kernel, tile);
    T* other = grad_features_ + tile.first * k_;
    plan_backward(plan, kernel, tile, tile_of(direct_, tile), plan.set ? other : output_ + 0);
    if (plan.set == 0) features_backward(plan, kernel, tile, other);
  });
  write_references(plan);
}

// The first round of a tile, and what it gives to features and references.
template <class T>
void Head<T>::plan_backward(const Plan<T>& plan, const T* kernel, Tile tile, const T* direct, T* df) {
  row_gradients(plan, kernel, tile, 1, right_[plan.set]);
  similarity_backward(plan, kernel, direct, tile);
  multiply<T>(ds_, m_, 1, plan.references, k_, tile.rows, call_.references, k_, df, k_);
  accumulate<T>(ds_, m_, features_, k_, tile.rows, m_rows_, k_, grad_references_[plan.set], k_);
}

template <class T>
void Head<T>::write_references(const Plan<T>& plan) {
  const long k = call_.features;
  T* out = of_head(plan.set ? call_.grad_scatter : call_.grad_gather, call_.references * k);
  for (long j = 0; j < call_.references; ++j) std::copy_n(grad_references_[plan.set] + j * k_, k, out + j * k);
}

// A round's x, and the sums of x K.
template <class T>
void Head<T>::round_backward(const Plan<T>& plan, long round, const T* y) {
  std::fill_n(columns_ + 0, m_, T(0));
  for_tiles(call_.tokens, [&](Tile tile) {
    const T* kernel = kernel_of(plan, tile);
    row_gradients(plan, kernel, tile, round, y);
    add_rows<T>(kernel, m_, plan.x + (round - 1) * n_ + tile.first, tile.rows, m_, columns_);
  });
}

// x = (df - u K y) / (K v); only the last round, where one begins, has a df.
template <class T>
void Head<T>::row_gradients(const Plan<T>& plan, const T* kernel, Tile tile, long round, const T* y) {
  dot_row<T>(kernel, m_, y, tile.rows, m_, sums_);
  const T *inverse = plan.inverse_kv + (round - 1) * n_ + tile.first, *a = row_sums_ + tile.first;
  const T* df = round == call_.rounds ? plan.df + tile.first : zeros_ + 0;
  T* x = plan.x + (round - 1) * n_ + tile.first;
  for (long t = 0; t < tile.rows; t += L) {
    vec(x + t) = (vec(df + t) - vec(a + t) * vec(inverse + t) * vec(sums_ + t)) * vec(inverse + t);
  }
}

// From the direct gradient of s / epsilon to the whole one of s; reads the tile's features.
template <class T>
void Head<T>::similarity_backward(const Plan<T>& plan, const T* kernel, const T* direct, Tile tile) {
  for (long round = 0; round < call_.rounds; ++round) {
    const T* inverse = plan.inverse_kv + round * n_ + tile.first;
    T *u = left_ + 2 * round * TILE, *x = u + TILE;
    for (long t = 0; t < tile.rows; t += L) vec(u + t) = vec(row_sums_ + tile.first + t) * vec(inverse + t);
    std::copy_n(plan.x + round * n_ + tile.first, tile.rows, x);
  }
  multiply<T>(left_, 1, TILE, right_[plan.set], m_, tile.rows, 2 * call_.rounds, m_, tile_, m_);
  const T scale = 1.0 / call_.epsilon;
  for (long i = 0; i < tile.rows * m_; i += L) {
    vec(ds_ + i) = (vec(direct + i) - vec(kernel + i) * vec(tile_ + i)) * scale;
  }
  read_features(tile);
  if (call_.sigma > 0) {
    similarity(plan, tile, tile_, true);
    const T narrow = 1.0 / (call_.sigma * call_.sigma);
    for (long i = 0; i < tile.rows * m_; i += L) vec(ds_ + i) *= vec(tile_ + i) * narrow;
  }
}

// Write the gradients of x and of features, once those of both plans are known.
template <class T>
void Head<T>::features_backward(const Plan<T>& plan, const T* kernel, Tile tile, const T* other) {
  T* df = output_;
  if (call_.two_sets) {
    for (long i = 0; i < tile.rows * k_; i += L) vec(df + i) += vec(other + i);
  }
  if (call_.compared.data) write<T>(call_.grad_compared, image_, head_, tile, call_.features, df);
  const T* w = gather_weights(kernel, tile);
  multiply<T>(w, m_, 1, grad_pooled_, d_, tile.rows, call_.references, d_, values_, d_);
  if (!call_.compared.data) dot_rows<T>(df, features_, k_, tile.rows, k_, sums_);
  for (long t = 0; t < tile.rows; ++t) {
    const T u = row_sums_[tile.first + t] * last_inverse_kv(plan)[tile.first + t];
    for (long c = 0; c < d_; c += L) {
      Vector<T>& dx = vec(values_ + t * d_ + c);
      dx *= u;
      if (call_.compared.data) continue;
      const long i = t * k_ + c;  // here features are x of unit length, and k = d
      dx += (vec(df + i) - vec(features_ + i) * sums_[t]) * inverse_length_[tile.first + t];
    }
  }
  write<T>(call_.grad_x, image_, head_, tile, call_.values, values_);
}

}  // namespace setformer
