// Vectors of the width of this CPU, and the five loops over small matrices of which set_attention.cpp is made.
//
// Matrices are row-major; rows and columns are padded to multiples of PAD, so no loop here has a remainder. Memory is
// aligned to the vector. Every sum has a fixed order, so results depend neither on time nor on the number of threads.

#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

namespace setformer {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, REGISTERS = 32;
#else
constexpr int VECTOR_BYTES = 16, REGISTERS = 16;
#endif

// A multiple of the numbers in any vector and of the rows in any block below, as small as that: 49 references become 56
// with vectors of 32 bytes, and 64 with those of 64.
constexpr long PAD = VECTOR_BYTES == 64 ? 16 : 8;

template <class T>
struct Vectors {
  typedef T Vector __attribute__((vector_size(VECTOR_BYTES), may_alias));
  using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T Unaligned __attribute__((vector_size(VECTOR_BYTES), may_alias, aligned(1)));
  typedef Integer Bits __attribute__((vector_size(VECTOR_BYTES), may_alias));
};

template <class T>
using Vector = typename Vectors<T>::Vector;

template <class T>
constexpr int LANES = VECTOR_BYTES / sizeof(T);

template <class T>
inline Vector<T>& vec(T* place) {
  return *reinterpret_cast<Vector<T>*>(place);
}

template <class T>
inline const Vector<T>& vec(const T* place) {
  return *reinterpret_cast<const Vector<T>*>(place);
}

inline long padded(long size) { return (size + PAD - 1) / PAD * PAD; }

// ---------------------------------------------------------------------------------------------------- exponential

template <class T>
struct ExpNumbers;

template <>
struct ExpNumbers<float> {
  static constexpr float LOWEST = -87.0f, LN2_HIGH = 0.693359375f, ROUND = 12582912.0f;  // 1.5 * 2^23
  static constexpr int MANTISSA = 23, DEGREE = 7;
};

template <>
struct ExpNumbers<double> {
  static constexpr double LOWEST = -708.0, LN2_HIGH = 6.93145751953125e-1, ROUND = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int MANTISSA = 52, DEGREE = 13;
};

constexpr double inverse_factorial(int n) { return n < 2 ? 1.0 : inverse_factorial(n - 1) / n; }

// exp(x) = 2^n exp(r), |r| <= ln 2 / 2, by Taylor's sum, whose rest is below the rounding of T. Below LOWEST it is 0,
// so that no denormal numbers slow down what follows; above 88 (709 in fp64) it has no meaning. NaN stays NaN.
template <class T>
__attribute__((always_inline)) inline Vector<T> exponential(Vector<T> x) {
  using N = ExpNumbers<T>;
  using Bits = typename Vectors<T>::Bits;
  constexpr T LOG2E = 1.4426950408889634073599L;
  constexpr T LN2_LOW = 0.693147180559945309417232121458L - static_cast<long double>(N::LN2_HIGH);
  const auto vanishes = x < N::LOWEST;
  x = vanishes ? Vector<T>{} : x;
  const Vector<T> rounded = x * LOG2E + N::ROUND;  // n stands in the low bits
  const Vector<T> n = rounded - N::ROUND;
  const Vector<T> r = (x - n * N::LN2_HIGH) - n * LN2_LOW;
  Vector<T> sum = r * T(inverse_factorial(N::DEGREE)) + T(inverse_factorial(N::DEGREE - 1));
#pragma GCC unroll 16
  for (int i = N::DEGREE - 2; i >= 0; --i) sum = sum * r + T(inverse_factorial(i));
  const Bits scaled = reinterpret_cast<const Bits&>(sum) + (reinterpret_cast<const Bits&>(rounded) << N::MANTISSA);
  return vanishes ? Vector<T>{} : reinterpret_cast<const Vector<T>&>(scaled);
}

// ---------------------------------------------------------------------------------------------- along the lanes

template <int HALF, class V, class Join, int... J>
inline V fold(V a, V b, const Join& join, std::integer_sequence<int, J...>) {
  constexpr int COUNT = sizeof...(J);
  return join(
      __builtin_shufflevector(a, b, ((J & HALF) ? COUNT + J : J)...),
      __builtin_shufflevector(a, b, ((J & HALF) ? COUNT + (J ^ HALF) : (J ^ HALF))...));
}

// Join the lanes of LANES vectors, in the lanes of one: lane j of the result is what became of parts[j].
template <class T, class Join, int HALF = LANES<T> / 2>
inline Vector<T> joined(Vector<T>* parts, const Join& join) {
#pragma GCC unroll 16
  for (int i = 0; i < HALF; ++i) {
    parts[i] = fold<HALF>(parts[i], parts[i + HALF], join, std::make_integer_sequence<int, LANES<T>>());
  }
  if constexpr (HALF > 1) {
    return joined<T, Join, HALF / 2>(parts, join);
  } else {
    return parts[0];
  }
}

template <class T>
inline Vector<T> larger(Vector<T> a, Vector<T> b) {
  return a > b ? a : b;
}

// Hold a vector in a register: GCC would load it again for each product, and loads would be the limit.
template <class V>
inline void hold(V& vector) {
#if defined(__x86_64__)
  asm("" : "+v"(vector));
#elif defined(__aarch64__)
  asm("" : "+w"(vector));
#endif
}

template <class T>
inline Vector<T> sums_of(Vector<T>* parts) {
  return joined<T>(parts, [](Vector<T> x, Vector<T> y) { return x + y; });
}

// out[r] = sum_c a[r, c] * b[c]
template <class T>
inline void dot_row(const T* a, long stride, const T* b, long rows, long columns, T* out) {
  constexpr int L = LANES<T>;
  for (long first = 0; first < rows; first += L) {
    Vector<T> parts[L] = {};
    for (long c = 0; c < columns; c += L) {
      Vector<T> line = vec(b + c);
      hold(line);
#pragma GCC unroll 16
      for (int r = 0; r < L; ++r) parts[r] += vec(a + (first + r) * stride + c) * line;
    }
    vec(out + first) = sums_of<T>(parts);
  }
}

// out[r] = sum_c a[r, c] * b[r, c]
template <class T>
inline void dot_rows(const T* a, const T* b, long stride, long rows, long columns, T* out) {
  constexpr int L = LANES<T>;
  for (long first = 0; first < rows; first += L) {
    Vector<T> parts[L] = {};
    for (long c = 0; c < columns; c += L) {
#pragma GCC unroll 16
      for (int r = 0; r < L; ++r) {
        const long place = (first + r) * stride + c;
        parts[r] += vec(a + place) * vec(b + place);
      }
    }
    vec(out + first) = sums_of<T>(parts);
  }
}

// ------------------------------------------------------------------------------------------------------- products

constexpr int MAX_VECTORS = REGISTERS / 8;  // columns of one block, in vectors

// Enough sums at once to hide the latency of a product, as far as the registers go.
constexpr int block_rows(int vectors) { return vectors <= REGISTERS / 16 + (REGISTERS == 32) ? 8 : 4; }

template <class T, int VECTORS>
inline void multiply_block(
    const T* a, long row, long step, const T* b, long b_stride, long inner, T* out, long stride) {
  constexpr int ROWS = block_rows(VECTORS), L = LANES<T>;
  Vector<T> sums[ROWS][VECTORS] = {};
  for (long p = 0; p < inner; ++p) {
    Vector<T> line[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) hold(line[v] = vec(b + p * b_stride + v * L));
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sums[r][v] += line[v] * a[r * row + p * step];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) vec(out + r * stride + v * L) = sums[r][v];
  }
}

template <class T, int VECTORS>
inline void accumulate_block(
    const T* a, long a_stride, const T* b, long b_stride, long inner, T* out, long stride) {
  constexpr int ROWS = block_rows(VECTORS), L = LANES<T>;
  Vector<T> sums[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = vec(out + r * stride + v * L);
  }
  for (long p = 0; p < inner; ++p) {
    Vector<T> line[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) hold(line[v] = vec(b + p * b_stride + v * L));
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sums[r][v] += line[v] * a[p * a_stride + r];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) vec(out + r * stride + v * L) = sums[r][v];
  }
}

// Call body(first column, std::integral_constant<int, VECTORS>) for blocks of columns as wide as registers allow.
template <class T, class Body>
inline void for_column_blocks(long columns, const Body& body) {
  long c = 0;
  for (; c + MAX_VECTORS * LANES<T> <= columns; c += MAX_VECTORS * LANES<T>) {
    body(c, std::integral_constant<int, MAX_VECTORS>());
  }
  switch ((columns - c) / LANES<T>) {
    case 3: body(c, std::integral_constant<int, MAX_VECTORS == 4 ? 3 : 1>()); break;
    case 2: body(c, std::integral_constant<int, MAX_VECTORS == 4 ? 2 : 1>()); break;
    case 1: body(c, std::integral_constant<int, 1>()); break;
    default: break;
  }
}

// out[r, c] = sum_p a[r * row + p * step] * b[p, c]
template <class T>
inline void multiply(
    const T* a, long row, long step, const T* b, long b_stride, long rows, long inner, long columns, T* out,
    long stride) {
  for_column_blocks<T>(columns, [&](long c, auto vectors) {
    for (long r = 0; r < rows; r += block_rows(vectors)) {
      multiply_block<T, vectors>(a + r * row, row, step, b + c, b_stride, inner, out + r * stride + c, stride);
    }
  });
}

// out[r, c] += sum_p a[p, r] * b[p, c]
template <class T>
inline void accumulate(
    const T* a, long a_stride, const T* b, long b_stride, long inner, long rows, long columns, T* out, long stride) {
  for_column_blocks<T>(columns, [&](long c, auto vectors) {
    for (long r = 0; r < rows; r += block_rows(vectors)) {
      accumulate_block<T, vectors>(a + r, a_stride, b + c, b_stride, inner, out + r * stride + c, stride);
    }
  });
}

template <class T, int VECTORS>
inline void add_rows_block(const T* a, long stride, const T* weight, long rows, T* out) {
  constexpr int L = LANES<T>;
  Vector<T> even[VECTORS] = {}, odd[VECTORS] = {};  // two chains hide the latency of the sum
  for (long r = 0; r < rows; r += 2) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      even[v] += vec(a + r * stride + v * L) * weight[r];
      odd[v] += vec(a + (r + 1) * stride + v * L) * weight[r + 1];
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; ++v) vec(out + v * L) += even[v] + odd[v];
}

// out[c] += sum_r weight[r] * a[r, c]
template <class T>
inline void add_rows(const T* a, long stride, const T* weight, long rows, long columns, T* out) {
  for_column_blocks<T>(columns, [&](long c, auto vectors) {
    add_rows_block<T, vectors>(a + c, stride, weight, rows, out + c);
  });
}

}  // namespace setformer
