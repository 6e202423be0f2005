// An unstructured-sparse convolution for CPUs, in a layout in which no pattern of zeros breaks vectors. C++17.
//
// Layout: x[group][channel][row][column][lane]. The lanes of one vector are the same pixel of LANES images, or, where
// there are fewer images, of `grid_rows` x `grid_columns` equal parts of each image; a shift by a pixel is then another
// vector and never an unaligned one. A convolution goes through tiles of TH x TW output pixels, kept in registers: the
// window of the input that a tile sees is packed for a block of input channels (a block fills the L1 cache), and for
// every output channel the non-zero weights are run through, one multiply-add with a memory operand a pixel.
//
// A list of non-zeros ("rows" are what is written, an output channel or, for strided input gradients, a phase of an
// input channel): for block b and row r the entries ptr[(b * rows + r) * parts] ... ptr[(b * rows + r + 1) * parts] hold
// `offset`, the place in the packed window in vectors, and a value. The values are the caller's, in the list's order.
// Where a tile sees one pixel around itself there are 9 parts, by where in that window an entry begins: a tile that is
// a whole plane leaves out the products with padding, a third of them.
//
// The file that includes this one says first how many threads there are, thread_count(), and how to use them: on_threads(n, f) calls
// f(0) ... f(n - 1), each on a thread.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#ifdef LANES  // the file that includes this one defines it, and ROWS
#elif defined(__AVX512F__)
#define LANES 16
#define ROWS 4
#elif defined(__AVX2__) || defined(__AVX__)
#define LANES 8
#define ROWS 2  // 16 registers
#else
#define LANES 4
#define ROWS 4
#endif
#define COLUMNS 4
#define INLINE inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(LANES * sizeof(float))));
typedef float unaligned __attribute__((vector_size(LANES * sizeof(float)), may_alias, aligned(4)));
typedef int32_t ivec __attribute__((vector_size(LANES * sizeof(int32_t))));

static INLINE vec load(const float* from) { return *(const unaligned*)from; }
static INLINE void store(float* to, vec v) { *(unaligned*)to = v; }

// Lanes of two vectors by their number
static INLINE vec pick(vec a, vec b, ivec from) {
#ifdef __clang__
  vec out;
  for (int l = 0; l < LANES; l++) out[l] = from[l] < LANES ? a[from[l]] : b[from[l] - LANES];
  return out;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

struct Grid {  // how images lie in lanes
  int64_t images, rows, columns;
  ivec shift[3][3], outside;  // the lane of the neighbouring part, or LANES outside of the image

  Grid(int64_t images, int64_t rows, int64_t columns) : images(images), rows(rows), columns(columns) {
    outside = LANES - (ivec){};
    for (int a = -1; a <= 1; a++)
      for (int b = -1; b <= 1; b++)
        for (int64_t lane = 0; lane < LANES; lane++) {
          int64_t part = lane % (rows * columns), i = part / columns + a, j = part % columns + b;
          bool inside = i >= 0 && i < rows && j >= 0 && j < columns;
          shift[a + 1][b + 1][lane] = inside ? lane - part + i * columns + j : LANES;
        }
  }
  // Lanes of images that are there, in the last group
  ivec valid() const {
    ivec mask;
    int64_t each = LANES / (rows * columns), last = (images + each - 1) / each - 1;
    for (int64_t l = 0; l < LANES; l++) mask[l] = last * each + l / (rows * columns) < images ? -1 : 0;
    return mask;
  }
};

static INLINE vec keep(ivec mask, vec v) { return (vec)(mask & (ivec)v); }
static INLINE vec rectified(vec v) { return (vec)(~(v < (vec){}) & (ivec)v); }  // NaN stays

static INLINE float sum(vec v) {
  float s[LANES];
  std::memcpy(s, &v, sizeof s);
  for (int half = LANES / 2; half; half /= 2)
    for (int l = 0; l < half; l++) s[l] += s[l + half];
  return s[0];
}

static float* scratch(size_t floats, int which) {  // kept by each thread
  static thread_local std::vector<float> kept[2];
  auto& own = kept[which];
  if (own.size() < floats + 16) own.resize(floats + 16);
  return (float*)(((uintptr_t)own.data() + 63) / 64 * 64);
}

// Calls f(begin, end) for pieces of [0, n). Each thread has an equal share, and takes pieces of the others' when it is
// done: on a CPU that other work uses, too, a thread that is disturbed does not hold up the rest
template <class F>
static void share(int64_t n, F f) {
  struct alignas(64) Next { std::atomic<int64_t> at; };
  int64_t threads = std::min<int64_t>(thread_count(), n);
  if (threads <= 1) return f(0, n);
  int64_t piece = std::max<int64_t>(1, n / (32 * threads));
  std::vector<Next> next(threads);
  for (int64_t t = 0; t < threads; t++) next[t].at = n * t / threads;
  on_threads(threads, [&](int64_t own) {
    for (int64_t i = 0; i < threads; i++) {
      int64_t t = (own + i) % threads, until = n * (t + 1) / threads;
      for (int64_t at; (at = next[t].at.fetch_add(piece, std::memory_order_relaxed)) < until;)
        f(at, std::min(at + piece, until));
    }
  });
}

enum Mode { FLAT, NEXT, AROUND, STRIDED };  // pixels beyond the tile: none, 1, 2; 2 at stride 2

constexpr int parts_of(int mode) { return mode == AROUND ? 9 : 1; }

// By the size of an output: 1 or 2 pixels; more; or, where nothing but padding is around it, one tile
enum Side { PIXEL = 1, PAIR, MANY, PLANE };

static int64_t side_of(int64_t mode, int64_t h, int64_t w, bool whole) {
  int64_t side = std::max(h, w);
  if (side <= PAIR) return side;
  return mode == AROUND && whole && h <= ROWS && w <= COLUMNS ? PLANE : MANY;
}
static int64_t rows_of(int64_t side) { return side > PAIR ? ROWS : side; }
static int64_t columns_of(int64_t side) { return side > PAIR ? COLUMNS : side; }

// Channels that are packed at once. Their windows fill the first cache, and the second where few weights are alive: each
// block costs another pass over the partial sums
static int64_t block_of(int64_t mode, int64_t side, double density) {
  static const int64_t sizes[4][4][3] = {  // by mode, side, and the share of weights that are alive: > 15 %, > 7 %, less
      {{256, 256, 256}, {128, 128, 128}, {32, 32, 64}, {32, 32, 64}},
      {{64, 64, 64}, {40, 40, 40}, {16, 16, 24}, {16, 16, 24}},
      {{32, 96, 128}, {32, 48, 64}, {16, 16, 24}, {32, 64, 64}},
      {{48, 96, 128}, {24, 48, 64}, {8, 16, 64}, {8, 16, 64}},
  };
  return sizes[mode][side - 1][density > 0.15 ? 0 : density > 0.07 ? 1 : 2];
}

constexpr int64_t NEAR = 1 << 18;  // floats that stay in the second cache

struct Convolution {
  int64_t groups, in, rows, h, w;    // input: groups, channels, size; rows of the list
  int64_t tiles_h, tiles_w;          // output pixels, of each phase
  int64_t out_h, out_w, out;         // as written: size and channels
  int64_t origin_h, origin_w, step;  // window of output pixel (0, 0); distance of the pixels packed
  int64_t phases;                    // 1, or the 2 of each direction in which a strided gradient is written
  int64_t block;                     // input channels packed at once
  Grid grid;

  // Whether a tile of th x tw pixels is all of the output, and padded all around
  bool alone(int64_t th, int64_t tw) const {
    return grid.rows * grid.columns == 1 && tiles_h <= th && tiles_w <= tw && origin_h < 0 && origin_w < 0;
  }
};

// Pack a window of PH x PW pixels, `step` apart, of `channels` channels
template <int PH, int PW>
static void pack(const Convolution& g, const float* x, int64_t channels, int64_t top, int64_t left, float* out) {
  int64_t size = g.h * g.w * LANES;
  if (top >= 0 && left >= 0 && top + (PH - 1) * g.step < g.h && left + (PW - 1) * g.step < g.w) {
    x += (top * g.w + left) * LANES;
    for (int64_t c = 0; c < channels; c++, x += size)
      for (int i = 0; i < PH; i++) {
        const float* from = x + i * g.step * g.w * LANES;
        for (int j = 0; j < PW; j++, out += LANES) store(out, load(from + j * g.step * LANES));
      }
    return;
  }
  struct Line { int64_t at; int part; };  // of this part of the images or the one before or after; -1 where there is none
  auto find = [&](int64_t at, int64_t length) -> Line {
    int part = at < 0 ? -1 : at >= length ? 1 : 0;
    at -= part * length;
    bool nowhere = at < 0 || at >= length || (part && g.grid.rows * g.grid.columns == 1);
    return {nowhere ? -1 : at, part};
  };
  struct Source { int64_t at; const ivec* shift; } sources[PH * PW];
  for (int i = 0; i < PH; i++)
    for (int j = 0; j < PW; j++) {
      Line line = find(top + i * g.step, g.h), place = find(left + j * g.step, g.w);
      bool nowhere = line.at < 0 || place.at < 0;
      sources[i * PW + j] = {nowhere ? 0 : (line.at * g.w + place.at) * LANES,
                             nowhere ? &g.grid.outside : &g.grid.shift[line.part + 1][place.part + 1]};
    }
  bool cut = g.grid.rows * g.grid.columns > 1;
  for (int64_t c = 0; c < channels; c++, x += size)
    for (const Source& from : sources) {
      vec seen = load(x + from.at);
      store(out, cut ? pick(seen, (vec){}, *from.shift) : from.shift == &g.grid.outside ? (vec){} : seen);
      out += LANES;
    }
}

// Fetches the window that is packed next, a line of it at a time, while the present one is worked on: lines of a window
// are short and far apart, so that the CPU would not see them coming
template <int PH, int PW>
struct Ahead {
  const float* x;
  int64_t line, lines, apart, size, step;

  // the window of the block after `b`, which may be the first of the next tile of `th` x `tw` ones
  Ahead(const Convolution& g, const float* from, int64_t tile, int64_t b, int64_t blocks, int64_t th, int64_t tw,
        int64_t high, int64_t wide, int64_t begin) {
    if (++b == blocks) b = begin, tile++;
    int64_t j = tile % tw * wide * g.step + g.origin_w, i = tile / tw % th * high * g.step + g.origin_h;
    int64_t group = tile / tw / th, c0 = b * g.block;
    i = std::clamp<int64_t>(i, 0, std::max<int64_t>(0, g.h - PH)), j = std::clamp<int64_t>(j, 0, std::max<int64_t>(0, g.w - PW));
    x = from + (((group * g.in + c0) * g.h + i) * g.w + j) * LANES;
    bool far = g.groups * g.in * g.h * g.w * LANES > NEAR && group < g.groups;
    lines = far ? std::min(g.block, g.in - c0) * PH : 0;
    line = 0, apart = g.w * LANES * g.step, size = g.h * g.w * LANES, step = g.step * LANES;
  }
  INLINE void fetch(int64_t until) {
    for (until = std::min(until, lines); line < until; line++) {
      const float* at = x + line / PH * size + line % PH * apart;
#pragma GCC unroll 16
      for (int j = 0; j < PW; j++) __builtin_prefetch(at + j * step);
    }
  }
};

// Whether a pixel of a tile is summed in one of so many pieces of a list: one for all entries, one for each line of the
// window in which they begin, or one for each place; where there are several, what lies around the tile is padding
template <int TH, int TW, int PIECES>
static constexpr bool counts(int piece, int pixel) {
  int line = PIECES == 9 ? piece / 3 : piece, place = PIECES == 9 ? piece % 3 : 1, i = pixel / TW, j = pixel % TW;
  if (PIECES == 1) return true;
  return !(line == 0 && i == 0) && !(line == 2 && i == TH - 1) && !(place == 0 && j == 0) && !(place == 2 && j == TW - 1);
}

template <int N>
using Number = std::integral_constant<int, N>;

// Calls f(piece, first entry, number of entries) for the pieces of a list
template <int PARTS, int PIECES, int P = 0, class F>
static INLINE void each_piece(const int32_t* list, F f) {
  if constexpr (P < PIECES) {
    f(Number<P>(), list[P * PARTS / PIECES], list[(P + 1) * PARTS / PIECES] - list[P * PARTS / PIECES]);
    each_piece<PARTS, PIECES, P + 1>(list, f);
  }
}

template <int TH, int TW, int STRIDE, int PW, int PIECES, int PIECE>
static INLINE void run(const float* window, const uint16_t* offset, const float* value, int64_t n, vec (&a)[TH * TW]) {
  int64_t e = 0;
  if constexpr (TH * TW == 1) {  // one sum would wait for itself, and a loop over the rest would be mispredicted
    if (n == 0) return;
    vec s[4] = {};
    for (; e + 4 <= n; e += 4)
#pragma GCC unroll 4
      for (int u = 0; u < 4; u++) s[u] += value[e + u] * load(window + (int64_t)offset[e + u] * LANES);
#pragma GCC unroll 4
    for (int u = 0; u < 3; u++) {
      int32_t left = e + u < n;
      int64_t at = (e + u) * left;
      s[u] += keep((ivec){} - left, value[at] * load(window + (int64_t)offset[at] * LANES));
    }
    a[0] += (s[0] + s[1]) + (s[2] + s[3]);
    return;
  }
  for (; e < n; e++) {
    const float* p = window + (int64_t)offset[e] * LANES;
    float v = value[e];
#pragma GCC unroll 16
    for (int i = 0; i < TH * TW; i++)
      if (counts<TH, TW, PIECES>(PIECE, i))
        a[i] += v * load(p + ((i / TW) * STRIDE * PW + (i % TW) * STRIDE) * LANES);
  }
}

template <int TH, int TW, int STRIDE, int MORE, int PIECES>
static void convolve(const Convolution& g, const float* x, const int32_t* ptr, const uint16_t* offset,
                     const float* value, const float* bias, const float* add, bool relu, float* y) {
  constexpr int PH = (TH - 1) * STRIDE + 1 + MORE, PW = (TW - 1) * STRIDE + 1 + MORE, TILE = TH * TW;
  constexpr int PARTS = parts_of(STRIDE == 2 ? STRIDED : MORE);
  int64_t th = (g.tiles_h + TH - 1) / TH, tw = (g.tiles_w + TW - 1) / TW, blocks = (g.in + g.block - 1) / g.block;
  int64_t tiles = g.groups * th * tw, threads = thread_count();
  bool far = g.groups * g.out * g.out_h * g.out_w * LANES > 4 * NEAR;
  int64_t splits = threads == 1 ? 1 : std::clamp<int64_t>((threads + tiles - 1) / tiles, 1, (g.rows + 15) / 16);
  share(tiles * splits, [&](int64_t begin, int64_t end) {
    float* window = scratch(g.block * PH * PW * LANES, 0);
    float* partial = blocks > 1 ? scratch(g.rows * TILE * LANES, 1) : nullptr;
    for (int64_t item = begin; item < end; item++) {
      int64_t split = item % splits, tile = item / splits, j0 = tile % tw * TW, i0 = tile / tw % th * TH;
      int64_t group = tile / tw / th, first = g.rows * split / splits, last = g.rows * (split + 1) / splits;
      bool whole = i0 + TH <= g.tiles_h && j0 + TW <= g.tiles_w && g.phases == 1;
      for (int64_t b = 0; b < blocks; b++) {
        int64_t c0 = b * g.block;
        pack<PH, PW>(g, x + (group * g.in + c0) * g.h * g.w * LANES, std::min(g.block, g.in - c0),
                     i0 * STRIDE * g.step + g.origin_h, j0 * STRIDE * g.step + g.origin_w, window);
        Ahead<PH, PW> ahead(g, x, tile, b, blocks, th, tw, TH * STRIDE, TW * STRIDE, 0);
        for (int64_t r = first; r < last; r++) {
          ahead.fetch((r - first + 1) * ahead.lines / (last - first));
          const int32_t* list = ptr + (b * g.rows + r) * PARTS;
          if (list[0] == list[PARTS] && b > 0 && b < blocks - 1) continue;
          vec a[TILE];
          if (b == 0) {
            vec start = (bias ? bias[r] : 0.f) - (vec){};
#pragma GCC unroll 16
            for (int i = 0; i < TILE; i++) a[i] = start;
          } else {
#pragma GCC unroll 16
            for (int i = 0; i < TILE; i++) a[i] = load(partial + (r * TILE + i) * LANES);
          }
          if (whole && far && b == blocks - 1 && r + 2 < last) {
            int64_t soon = (((group * g.out + r + 2) * g.out_h + i0) * g.out_w + j0) * LANES;
#pragma GCC unroll 16
            for (int i = 0; i < TILE; i++) __builtin_prefetch(y + soon + (i / TW * g.out_w + i % TW) * LANES, 1);
            if (add) {
#pragma GCC unroll 16
              for (int i = 0; i < TILE; i++) __builtin_prefetch(add + soon + (i / TW * g.out_w + i % TW) * LANES);
            }
          }
          each_piece<PARTS, PIECES>(list, [&](auto piece, int64_t e, int64_t n) __attribute__((always_inline)) {
            run<TH, TW, STRIDE, PW, PIECES, decltype(piece)::value>(window, offset + e, value + e, n, a);
          });
          if (b < blocks - 1) {
#pragma GCC unroll 16
            for (int i = 0; i < TILE; i++) store(partial + (r * TILE + i) * LANES, a[i]);
            continue;
          }
          int64_t phase = r / g.out, ph = phase / g.phases, pw = phase % g.phases;
          int64_t plane = (group * g.out + r % g.out) * g.out_h * g.out_w;
          if (whole) {
            int64_t at = (plane + i0 * g.out_w + j0) * LANES;
#pragma GCC unroll 16
            for (int i = 0; i < TILE; i++) {
              int64_t to = at + (i / TW * g.out_w + i % TW) * LANES;
              vec out = add ? a[i] + load(add + to) : a[i];
              store(y + to, relu ? rectified(out) : out);
            }
            continue;
          }
#pragma GCC unroll 16
          for (int i = 0; i < TILE; i++) {
            int64_t row = (i0 + i / TW) * g.phases + ph, column = (j0 + i % TW) * g.phases + pw;
            if (row >= g.out_h || column >= g.out_w) continue;
            int64_t to = (plane + row * g.out_w + column) * LANES;
            vec out = add ? a[i] + load(add + to) : a[i];
            store(y + to, relu ? rectified(out) : out);
          }
        }
      }
    }
  });
}

// What a kernel is made for: tiles of so many output pixels, their distance in the input, the pixels that a tile sees
// beyond itself, and the pieces of a list
template <int ROWS_, int COLUMNS_, int STRIDE_, int MORE_, int PIECES_>
struct Tile {
  static constexpr int TH = ROWS_, TW = COLUMNS_, STRIDE = STRIDE_, MORE = MORE_, PIECES = PIECES_;
};

// Calls the kernel for a mode and the size of the output; `entries` tells whether lists are worth to be cut in 9
template <class Kernel>
static void dispatch(int64_t mode, const Convolution& g, int64_t entries, Kernel kernel) {
#define TILES(TH, TW)                                     \
  switch (mode) {                                         \
    case FLAT: return kernel(Tile<TH, TW, 1, 0, 1>());    \
    case NEXT: return kernel(Tile<TH, TW, 1, 1, 1>());    \
    case AROUND: return kernel(Tile<TH, TW, 1, 2, 1>());  \
    default: return kernel(Tile<TH, TW, 2, 2, 1>());      \
  }
  int64_t side = std::max(g.tiles_h, g.tiles_w), lists = (g.in + g.block - 1) / g.block * g.rows;
  if (side == 1) { TILES(1, 1) }
  if (side == 2) { TILES(2, 2) }
  if (mode == AROUND && g.alone(ROWS, COLUMNS)) {
    if (entries > 24 * lists) return kernel(Tile<ROWS, COLUMNS, 1, 2, 9>());
    return kernel(Tile<ROWS, COLUMNS, 1, 2, 3>());
  }
  TILES(ROWS, COLUMNS)
}

// y = convolution of x with the listed weights, plus bias, plus `add`, rectified
static void convolve(int64_t mode, const Convolution& g, const float* x, const int32_t* ptr, const uint16_t* offset,
                     const float* value, const float* bias, const float* add, bool relu, float* y) {
  int64_t entries = ptr[(g.in + g.block - 1) / g.block * g.rows * parts_of(mode)];
  dispatch(mode, g, entries, [&](auto tile) {
    using T = decltype(tile);
    convolve<T::TH, T::TW, T::STRIDE, T::MORE, T::PIECES>(g, x, ptr, offset, value, bias, add, relu, y);
  });
}
