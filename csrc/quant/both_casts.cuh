// A tile of 128 tokens by 128 columns cast in both directions: 128 x 1 and transposed, for a weight gradient, and 1 x 128,
// for what else is multiplied by it. A thread holds a piece of it; maxima go over a warp of 8 packs by 16 tokens, then
// through shared memory. Of `moe` too: its rows and tests are to be recorded again when this changes, which its csrc_sha does
// not say.
#pragma once

#include <optional>

#include "tile.cuh"

namespace dsv3 {

constexpr int kQuads = kTile / 4;  // of tokens

// Rows of x: of a group, or of a tile of the output.
struct Rows {
  int first, count;
  __device__ __forceinline__ int tiles() const { return (count + kTile - 1) / kTile; }
};

// The rows of x that groups have.
struct Groups {
  const int* offsets;  // [count + 1], or null: one group of all tokens
  int count;
  int tokens;

  // Offsets that are not what they should be give wrong rows, but none outside of x.
  __device__ __forceinline__ Rows rows(int g) const {
    const int first = min(max(offsets[g], 0), tokens), end = min(max(offsets[g + 1], 0), tokens);
    return {first, max(end - first, 0)};
  }

  // Which rows of x a tile of the output holds, in which every group begins a tile; count 0: it is padding. For whole
  // warps, a lane of which counts the tiles of its share of the groups.
  __device__ __forceinline__ Rows of_tile(int tile) const {
    if (offsets == nullptr) return {tile * kTile, min(kTile, tokens - tile * kTile)};
    const int lane = threadIdx.x % kWarpSize, share = (count + kWarpSize - 1) / kWarpSize;
    int tiles = 0;
#pragma unroll 4
    for (int g = lane * share; g < min((lane + 1) * share, count); ++g) tiles += rows(g).tiles();
    int end = tiles;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, end, offset);
      if (lane >= offset) end += other;
    }
    const uint32_t after = __ballot_sync(0xffffffffu, end > tile);
    if (after == 0) return {0, 0};
    const int owner = __ffs(after) - 1;
    tile -= __shfl_sync(0xffffffffu, end - tiles, owner);
    int g = owner * share;
    Rows found = rows(g);
    for (; tile >= found.tiles(); found = rows(++g)) tile -= found.tiles();
    return {found.first + tile * kTile, min(kTile, found.count - tile * kTile)};
  }
};

// Where the transposed cast goes.
struct ColumnCasts {
  uint8_t* out;  // [K, slots]
  float* sf;     // [slots / 128][sf_stride]
  uint32_t sf_stride;
  int64_t slots;  // Tp, whole tiles
  ScaleRule rule;
};

// The slots that cast_transpose has for tokens, of `groups` groups where there are offsets.
inline int64_t transposed_slots(int64_t tokens, const std::optional<Tensor>& offsets) {
  const int64_t more = offsets ? (kTile - 1) * (offsets->numel() - 1) : 0;
  return ceil_div(tokens + more, kTile) * kTile;
}

// Checks offsets int32 [G + 1], or none.
inline Groups check_groups(const std::optional<Tensor>& offsets, int64_t tokens) {
  const int64_t count = offsets ? offsets->numel() - 1 : 1;
  DSV3_CHECK(count >= 1, "offsets must have at least two entries, got ", count + 1);
  if (offsets) check_operand("offsets", *offsets, Dtype::kInt32, count + 1);
  return {offsets ? offsets->data<int>() : nullptr, static_cast<int>(count), static_cast<int>(tokens)};
}

// Checks the outputs of a transposed cast of (tokens, columns).
inline ColumnCasts column_casts(const char* data_name, const Tensor& data, const char* sf_name, const Tensor& sf,
                                int64_t columns, int64_t slots, ScaleRule rule) {
  check_operand(data_name, data, Dtype::kE4M3, columns, slots);
  const int64_t stride = check_row_scales(sf_name, sf, columns, slots / kTile);
  return {data.data<uint8_t>(), sf.data<float>(), static_cast<uint32_t>(stride), slots, rule};
}

template <class T>
constexpr bool kIsCast = sizeof(T) == 1;

// What a thread holds: 4 tokens of 16 bytes of columns, with their scales where x is e4m3.
template <class T>
struct Piece {
  Pack<T> packs[4];
  float sf[4];

  // Columns 4 * chunk to 4 * chunk + 3 of token r.
  __device__ __forceinline__ void values(int r, int chunk, float (&x)[4]) const {
    unpack(packs[r], chunk, x);
#pragma unroll
    for (int v = 0; kIsCast<T> && v < 4; ++v) x[v] = __fmul_rn(x[v], sf[r]);
  }
};

// Words of 4 tokens, of columns c to c + 3 of a piece, by the inverses of their scales.
template <class T>
__device__ __forceinline__ void column_codes(const Piece<T>& piece, int c, const float* inverses,
                                             uint32_t (&words)[4]) {
  const float4 inverse = *reinterpret_cast<const float4*>(inverses);
  const float factors[4] = {inverse.x, inverse.y, inverse.z, inverse.w};
  float x[4][4];
#pragma unroll
  for (int r = 0; r < 4; ++r) piece.values(r, c / 4, x[r]);
#pragma unroll
  for (int v = 0; v < 4; ++v) {
    const float tokens[4] = {x[0][v], x[1][v], x[2][v], x[3][v]};
    words[v] = encode(tokens, factors[v]);
  }
}

constexpr int kWarpRows = kTile / 16;  // warps that share columns; each has 16 tokens of 8 packs

template <class T>
struct Shape {
  static constexpr int kPacks = kTile / Pack<T>::kSize;  // of columns
  static constexpr int kParts = kPacks / kLanePacks;     // warps that share rows
  static constexpr int kThreads = kPacks * kQuads;
  static constexpr int kBlocks = 1024 / kThreads;  // a multiprocessor
};

// The thread's quad of tokens, which of the warps that share rows it is in, and its first column in the tile.
__device__ __forceinline__ int thread_quad() { return threadIdx.x / kLanePacks % kQuads; }
__device__ __forceinline__ int thread_part() { return threadIdx.x / (kLanePacks * kQuads); }
template <class T>
__device__ __forceinline__ int thread_column() {
  return (threadIdx.x % kLanePacks + thread_part() * kLanePacks) * Pack<T>::kSize;
}

// Absolute maxima, with any sign, of a warp's columns over its 16 tokens: in every lane those of its own columns.
template <class T>
__device__ __forceinline__ void column_maxima(const Piece<T>& piece, float (&amax)[Pack<T>::kSize]) {
  Pack<T> maxima = piece.packs[0];
#pragma unroll
  for (int r = 1; r < 4; ++r) abs_max(maxima, piece.packs[r]);
#pragma unroll
  for (int offset = kLanePacks; offset < kWarpSize; offset *= 2) {
    Pack<T> other;
#pragma unroll
    for (int i = 0; i < 4; ++i) other.words[i] = __shfl_xor_sync(0xffffffffu, maxima.words[i], offset);
    abs_max(maxima, other);
  }
#pragma unroll
  for (int c = 0; c < Pack<T>::kSize; c += 4) unpack(maxima, c / 4, reinterpret_cast<float (&)[4]>(amax[c]));
}

// Absolute maxima, with any sign, of the thread's 4 tokens over the 8 packs of its warp.
__device__ __forceinline__ void row_maxima(const Piece<__nv_bfloat16>& piece, float (&amax)[4]) {
  constexpr __nv_bfloat16 kPairs{};
  uint32_t max[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const uint32_t (&words)[4] = piece.packs[r].words;
    max[r] =
        abs_max_words(abs_max_words(words[0], words[1], kPairs), abs_max_words(words[2], words[3], kPairs), kPairs);
  }
#pragma unroll
  for (int r = 0; r < 4; r += 2) {
    const uint32_t even = __byte_perm(max[r], max[r + 1], 0x5410), odd = __byte_perm(max[r], max[r + 1], 0x7632);
    uint32_t two = abs_max_words(even, odd, kPairs);
#pragma unroll
    for (int offset = kLanePacks / 2; offset > 0; offset /= 2) {
      two = abs_max_words(two, __shfl_xor_sync(0xffffffffu, two, offset), kPairs);
    }
    amax[r] = __uint_as_float(two << 16);
    amax[r + 1] = __uint_as_float(two & 0xffff0000u);
  }
}
__device__ __forceinline__ void row_maxima(const Piece<float>& piece, float (&amax)[4]) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    amax[r] = abs_max(piece.packs[r]);
#pragma unroll
    for (int offset = kLanePacks / 2; offset > 0; offset /= 2) {
      amax[r] = abs_max(amax[r], __shfl_xor_sync(0xffffffffu, amax[r], offset));
    }
  }
}

// What the block must know of a tile to cast it by columns: the maxima of warps, then the inverses of its scales.
template <class T>
struct ColumnScales {
  float maxima[kWarpRows][kTile];
  float inverses[kTile];

  __device__ __forceinline__ void collect(const Piece<T>& piece) {
    constexpr int kSize = Pack<T>::kSize;
    float amax[kSize];
    column_maxima(piece, amax);
    if (threadIdx.x % kWarpSize >= kLanePacks) return;
    auto* const to = reinterpret_cast<float4*>(&maxima[threadIdx.x / kWarpSize % kWarpRows][thread_column<T>()]);
#pragma unroll
    for (int c = 0; c < kSize; c += 4) to[c / 4] = make_float4(amax[c], amax[c + 1], amax[c + 2], amax[c + 3]);
  }

  // The scale of column c of the tile, which is column `column` of x, and 1 where there are no tokens.
  __device__ __forceinline__ void scale(const ColumnCasts& to, int c, int column, int columns, int tile, bool padding) {
    float max = 0.f;
#pragma unroll
    for (int w = 0; w < kWarpRows; ++w) max = abs_max(max, maxima[w][c]);
    const float sf = padding ? 1.f : tile_scale(max, to.rule);
    inverses[c] = __frcp_rn(sf);
    if (column < columns) to.sf[tile * to.sf_stride + column] = sf;
  }

  // Words of the thread's 4 tokens, one a column.
  __device__ __forceinline__ void codes(const Piece<T>& piece, uint32_t (&words)[Pack<T>::kSize]) const {
#pragma unroll
    for (int c = 0; c < Pack<T>::kSize; c += 4)
      column_codes(piece, c, &inverses[thread_column<T>() + c], reinterpret_cast<uint32_t (&)[4]>(words[c]));
  }
};

// The same to cast it by rows.
template <class T>
struct RowScales {
  float maxima[Shape<T>::kParts][kTile];
  float inverses[kTile];

  __device__ __forceinline__ void collect(const Piece<T>& piece) {
    float amax[4];
    row_maxima(piece, amax);
    auto& to = reinterpret_cast<float4&>(maxima[thread_part()][4 * thread_quad()]);
    if (threadIdx.x % kLanePacks == 0) to = make_float4(amax[0], amax[1], amax[2], amax[3]);
  }

  // The scale of row r of the tile, the n-th of its row.
  __device__ __forceinline__ void scale(const RowCasts& to, int r, uint32_t n, const Rows& rows) {
    float max = 0.f;
#pragma unroll
    for (int part = 0; part < Shape<T>::kParts; ++part) max = abs_max(max, maxima[part][r]);
    const float sf = tile_scale(max, to.rule);
    inverses[r] = __frcp_rn(sf);
    if (r < rows.count) to.sf[n * to.sf_stride + rows.first + r] = sf;
  }

  // Writes the codes of the thread's piece, whose first column is `column` of `columns`.
  __device__ __forceinline__ void store(const RowCasts& to, const Piece<T>& piece, int column, int columns,
                                        const Rows& rows) const {
    const int quad = thread_quad(), live = column < columns ? rows.count - 4 * quad : 0;
    const float4 inverse = reinterpret_cast<const float4&>(inverses[4 * quad]);
    const float factors[4] = {inverse.x, inverse.y, inverse.z, inverse.w};
    uint8_t* out = to.out + static_cast<int64_t>(rows.first + 4 * quad) * columns + column;
#pragma unroll
    for (int r = 0; r < 4; ++r, out += columns) {
      uint32_t words[Pack<T>::kSize / 4];
#pragma unroll
      for (int c = 0; c < Pack<T>::kSize / 4; ++c) {
        float x[4];
        piece.values(r, c, x);
        words[c] = encode(x, factors[r]);
      }
      if (r < live) store_words(out, words);
    }
  }
};

}  // namespace dsv3
