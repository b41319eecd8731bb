// What a call is given, and how a tile of tokens comes in and goes out: any float type, any strides.

#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <type_traits>

#include "memory.h"
#include "vectors.h"

namespace setformer {

constexpr long TILE = 32;  // tokens; K of a tile and what goes with it fit into 32 KiB for m = 49

enum Type : int64_t { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };

// These are mirrored in ops/set/cpp.py (`Part` in split_cpp.py), field by field; absent tensors have no data.
struct Tokens {
  void* data;
  int64_t type;
  int64_t image_stride, head_stride, token_stride, stride;
};

struct Call {
  int64_t images, heads, tokens, references, features, values, axes, rounds;
  int64_t two_sets, renormalise, own_places;  // own_places: every image has its own positions
  double epsilon, sigma, tau;
  Tokens x, compared, y, grad_x, grad_compared;  // y: the output, or in the backward its gradient
  void *gather, *scatter;                        // (h, m, k), from here on contiguous and in the working dtype
  void *positions, *places;                      // (b or 1, n, axes), (m, axes)
  uint8_t* mask;                                 // (b, n)
  void* scalings;                                // v of all rounds, (sets, b, h, L + 1, m)
  void *grad_gather, *grad_scatter;              // (b, h, m, k), one for each image
  // Of tokens that are a part of the images: valid tokens of each whole image, (b), and the largest logarithm of the
  // filter in each column over all of them, (b, or 1 where all are alike, m). Otherwise they are found here.
  int64_t* valid;
  void* nearest;
};

enum Pass : int64_t {
  ROUND, SCATTER, SCATTER_BACKWARD, GATHER_BACKWARD, ROUND_BACKWARD, TOKENS_BACKWARD, IMPLICIT_SYSTEM, IMPLICIT_SIDE,
  IMPLICIT_TOKENS
};

// One pass over a part's tokens (split.h). Tensors are contiguous and in the working dtype; those marked with + are
// padded: n to a multiple of 16, m likewise.
struct Part {
  Call call;                     // scalings: as far as they are known
  int64_t round;                 // where the pass is one of a round
  int64_t kept;                  // heads whose kernel matrices stay in memory; those of the others are computed again
  void* kernels;                 // (sets, kept, n, m) +
  void *pooled, *pooled_sums;    // (b, h, m, d), (b, h, m): sums out of the last round; then pooled alone, in
  void* columns[2];              // (b, h, m) for each set: sums out of a pass; absent where nobody asks for them
  void* rows;                    // (sets, b, h, 2 L + 1, n) +: the backward's: 1 / (K v) and x of each round, and df
  void *grad_pooled, *along;     // (b, h, m, d), (b, h, m): sums out of SCATTER_BACKWARD; t and t . pooled, in
  void* y;                       // (sets, b, h, L, m): of the backward's rounds, as far as they are known
  // In fp64, of the implicit gradient: column sums of the plan P, P^T (P 1)^-1 P and P^T (P 1)^-1 df of each set.
  double *system, *gram, *side;  // (sets, b, h, m), (sets, b, h, m, m), (sets, b, h, m)
};

struct Tile {
  long first, count, rows;  // rows: count, padded
};

template <class Body>
void for_tiles(long tokens, const Body& body) {
  for (long first = 0; first < tokens; first += TILE) {
    const long count = std::min(TILE, tokens - first);
    body(Tile{first, count, padded(count)});
  }
}

// ------------------------------------------------------------------------------------------- tokens in and out

// Fetch a row of the tile after this one while this one is worked on.
template <class From>
inline void prefetch(const From* from, long width) {
  for (long byte = 0; byte < width * static_cast<long>(sizeof(From)); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(from) + byte);
  }
}

template <class From, class To>
inline void copy_row(const From* from, long width, To* to) {
  long c = 0;
  if constexpr (std::is_same_v<From, To>) {
    using Unaligned = typename Vectors<To>::Unaligned;
    for (; c + LANES<To> <= width; c += LANES<To>) {
      *reinterpret_cast<Unaligned*>(to + c) = *reinterpret_cast<const Unaligned*>(from + c);
    }
  }
  for (; c < width; ++c) to[c] = static_cast<To>(from[c]);
}

template <class T, class From>
void read_rows(const From* from, const Tokens& tokens, Tile tile, long width, T* out) {
  const long stride = padded(width);
  std::fill_n(out + tile.count * stride, (tile.rows - tile.count) * stride, T(0));
  for (long t = 0; t < tile.count; ++t, from += tokens.token_stride) {
    T* row = out + t * stride;
    if (tokens.stride == 1) {
      prefetch(from + TILE * tokens.token_stride, width);
      copy_row(from, width, row);
    } else {
      for (long c = 0; c < width; ++c) row[c] = static_cast<T>(from[c * tokens.stride]);
    }
    std::fill(row + width, row + stride, T(0));
  }
}

template <class T, class To>
void write_rows(To* to, const Tokens& tokens, Tile tile, long width, const T* rows) {
  for (long t = 0; t < tile.count; ++t, to += tokens.token_stride, rows += padded(width)) {
    if (tokens.stride == 1) {
      copy_row(rows, width, to);
    } else {
      for (long c = 0; c < width; ++c) to[c * tokens.stride] = static_cast<To>(rows[c]);
    }
  }
}

// Call body(pointer to the tile's first number, in the tensor's own type).
template <class Body>
void in_own_type(const Tokens& tokens, long image, long head, Tile tile, const Body& body) {
  const long offset = image * tokens.image_stride + head * tokens.head_stride + tile.first * tokens.token_stride;
  switch (tokens.type) {
    case FLOAT32: body(static_cast<float*>(tokens.data) + offset); break;
    case FLOAT64: body(static_cast<double*>(tokens.data) + offset); break;
    case BFLOAT16: body(static_cast<c10::BFloat16*>(tokens.data) + offset); break;
    default: body(static_cast<c10::Half*>(tokens.data) + offset); break;
  }
}

template <class T>
void read(const Tokens& tokens, long image, long head, Tile tile, long width, T* out) {
  in_own_type(tokens, image, head, tile, [&](auto* from) { read_rows<T>(from, tokens, tile, width, out); });
}

template <class T>
void write(const Tokens& tokens, long image, long head, Tile tile, long width, const T* rows) {
  in_own_type(tokens, image, head, tile, [&](auto* to) { write_rows<T>(to, tokens, tile, width, rows); });
}

}  // namespace setformer
