// SeT attention on CPUs: what the library offers, and the threads. One thread takes one head of one image at a time.

#include <ATen/Parallel.h>

#include <cmath>

#include "head.h"
#include "plan.h"
#include "split.h"

namespace setformer {

template <class T>
void run(const Call& call, bool backward) {
  at::parallel_for(0, call.images * call.heads, 1, [&](long first, long last) {
    Head<T> head(call, backward);
    for (long i = first; i < last; ++i) {
      if (backward) {
        head.backward(i / call.heads, i % call.heads);
      } else {
        head.forward(i / call.heads, i % call.heads);
      }
    }
  });
}

// Add the images' gradients of a reference set into those of the first image, always in the same order, and lead them
// through the division of the references by their lengths.
template <class T>
void sum_images(const Call& call, const void* references, void* gradients) {
  if (!gradients) return;
  const long width = call.features, size = call.references * width;
  at::parallel_for(0, call.heads, 1, [&](long first, long last) {
    T* total = static_cast<T*>(gradients);
    for (long image = 1; image < call.images; ++image) {
      const T* one = total + image * call.heads * size;
      for (long i = first * size; i < last * size; ++i) total[i] += one[i];
    }
    for (long i = first * size; i < last * size; i += width) {
      const T* given = static_cast<const T*>(references) + i;
      const T square = squared_length(given, width), inverse = T(1) / std::sqrt(std::max(square, T(SMALLEST)));
      T along = 0;
      for (long p = 0; p < width && square >= T(SMALLEST); ++p) along += total[i + p] * given[p];
      along *= inverse * inverse;
      for (long p = 0; p < width; ++p) total[i + p] = (total[i + p] - given[p] * along) * inverse;
    }
  });
}

// One pass over the part.
template <class T>
void run_part(const Part& part, int64_t pass) {
  const Call& call = part.call;
  at::parallel_for(0, call.images * call.heads, 1, [&](long first, long last) {
    Head<T> head(call, pass >= SCATTER_BACKWARD, &part);
    for (long i = first; i < last; ++i) head.part(static_cast<Pass>(pass), i / call.heads, i % call.heads);
  });
  if (pass != TOKENS_BACKWARD && pass != IMPLICIT_TOKENS) return;
  sum_images<T>(call, call.gather, call.grad_gather);
  sum_images<T>(call, call.scatter, call.grad_scatter);
}

template <class T>
void dispatch(const Call& call, bool backward) {
  run<T>(call, backward);
  if (!backward) return;
  sum_images<T>(call, call.gather, call.grad_gather);
  sum_images<T>(call, call.scatter, call.grad_scatter);
}

}  // namespace setformer

#define PUBLIC extern "C" __attribute__((visibility("default")))

// Return 0, or 1 where memory is short.
PUBLIC int setformer_set_attention(const setformer::Call* call, int wide, int backward) {
  try {
    wide ? setformer::dispatch<double>(*call, backward) : setformer::dispatch<float>(*call, backward);
    return 0;
  } catch (...) {
    return 1;  // nothing but the memory of the matrices can fail
  }
}

// One pass over a part of the tokens (split.h); returns as above.
PUBLIC int setformer_split_attention(const setformer::Part* part, int wide, int64_t pass) {
  try {
    wide ? setformer::run_part<double>(*part, pass) : setformer::run_part<float>(*part, pass);
    return 0;
  } catch (...) {
    return 1;  // nothing but the memory of a tile can fail
  }
}

// Plans of `problems` similarities (problems, n, m), with the v of every round (problems, rounds + 1, m); returns as above.
PUBLIC int setformer_plans(
    const void* similarity, int64_t problems, int64_t n, int64_t m, int64_t rounds, double epsilon, int wide,
    void* scalings, void* plan) {
  using namespace setformer;
  try {
    if (wide) {
      plans<double>(
          static_cast<const double*>(similarity), problems, n, m, rounds, epsilon, static_cast<double*>(scalings),
          static_cast<double*>(plan));
    } else {
      plans<float>(
          static_cast<const float*>(similarity), problems, n, m, rounds, epsilon, static_cast<float*>(scalings),
          static_cast<float*>(plan));
    }
    return 0;
  } catch (...) {
    return 1;  // nothing but the memory of the matrices can fail
  }
}

// Ask for huge pages under memory that a caller has taken for an output and not written yet.
PUBLIC void setformer_prefer_huge_pages(void* data, int64_t bytes) { setformer::prefer_huge_pages(data, bytes); }

// exp of `count` numbers (a multiple of 16, aligned to 64 bytes), for the tests of its accuracy.
PUBLIC void setformer_exponential(void* numbers, int64_t count, int wide) {
  using namespace setformer;
  float* narrow_ = static_cast<float*>(numbers);
  double* wide_ = static_cast<double*>(numbers);
  for (int64_t i = 0; !wide && i < count; i += LANES<float>) vec(narrow_ + i) = exponential<float>(vec(narrow_ + i));
  for (int64_t i = 0; wide && i < count; i += LANES<double>) vec(wide_ + i) = exponential<double>(vec(wide_ + i));
}
