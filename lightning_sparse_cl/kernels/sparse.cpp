// Unstructured-sparse convolutions and batch-norm for CPUs, in a layout in which no pattern of zeros breaks vectors.
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

#include <ATen/Parallel.h>
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#if defined(__AVX512F__)
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

typedef float vec __attribute__((vector_size(LANES * sizeof(float)), may_alias, aligned(4)));
typedef int32_t ivec __attribute__((vector_size(LANES * sizeof(int32_t)), may_alias));

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
  ivec shift[3][3];  // the lane of the neighbouring part, or LANES outside the image

  Grid(int64_t images, int64_t rows, int64_t columns) : images(images), rows(rows), columns(columns) {
    for (int a = -1; a <= 1; a++)
      for (int b = -1; b <= 1; b++)
        for (int64_t lane = 0; lane < LANES; lane++) {
          int64_t part = lane % (rows * columns), i = part / columns + a, j = part % columns + b;
          bool inside = i >= 0 && i < rows && j >= 0 && j < columns;
          shift[a + 1][b + 1][lane] = inside ? lane - part + i * columns + j : LANES;
        }
  }
  INLINE vec neighbour(const float* v, int a, int b) const { return pick(*(const vec*)v, (vec){}, shift[a + 1][b + 1]); }
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

static INLINE float sum(const float* v) {
  float s[LANES];
  std::memcpy(s, v, sizeof s);
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
// done: on a CPU that somebody else uses, too, a thread that is disturbed does not hold up the rest
template <class F>
static void share(int64_t n, F f) {
  struct alignas(64) Next { std::atomic<int64_t> at; };
  int64_t threads = std::min<int64_t>(at::get_num_threads(), n);
  if (threads <= 1) return f(0, n);
  int64_t piece = std::max<int64_t>(1, n / (32 * threads));
  std::vector<Next> next(threads);
  for (int64_t t = 0; t < threads; t++) next[t].at = n * t / threads;
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t own = begin; own < end; own++)
      for (int64_t i = 0; i < threads; i++) {
        int64_t t = (own + i) % threads, until = n * (t + 1) / threads;
        for (int64_t at; (at = next[t].at.fetch_add(piece, std::memory_order_relaxed)) < until;)
          f(at, std::min(at + piece, until));
      }
  });
}

enum Mode { FLAT, NEXT, AROUND, STRIDED };  // pixels beyond the tile: none, 1, 2; 2 at stride 2

constexpr int parts_of(int mode) { return mode == AROUND ? 9 : 1; }

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
        for (int j = 0; j < PW; j++, out += LANES) *(vec*)out = *(const vec*)(from + j * g.step * LANES);
      }
    return;
  }
  struct Line { int64_t at; int part; } lines[PH], places[PW];
  auto find = [&](int64_t at, int64_t length) -> Line {
    int part = at < 0 ? -1 : at >= length ? 1 : 0;
    at -= part * length;
    bool nowhere = at < 0 || at >= length || (part && g.grid.rows * g.grid.columns == 1);
    return {nowhere ? -1 : at, part};
  };
  for (int i = 0; i < PH; i++) lines[i] = find(top + i * g.step, g.h);
  for (int j = 0; j < PW; j++) places[j] = find(left + j * g.step, g.w);
  for (int64_t c = 0; c < channels; c++, x += size)
    for (int i = 0; i < PH; i++)
      for (int j = 0; j < PW; j++, out += LANES) {
        if (lines[i].at < 0 || places[j].at < 0) {
          *(vec*)out = (vec){};
          continue;
        }
        const float* from = x + (lines[i].at * g.w + places[j].at) * LANES;
        *(vec*)out = lines[i].part || places[j].part ? g.grid.neighbour(from, lines[i].part, places[j].part)
                                                     : *(const vec*)from;
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

// Calls f<piece>(first entry, number of entries) for the pieces of a list
template <int PARTS, int PIECES, class F>
static INLINE void each_piece(const int32_t* list, F f) {
  [&]<int... P>(std::integer_sequence<int, P...>) __attribute__((always_inline)) {
    (f.template operator()<P>(list[P * PARTS / PIECES], list[(P + 1) * PARTS / PIECES] - list[P * PARTS / PIECES]), ...);
  }(std::make_integer_sequence<int, PIECES>());
}

template <int TH, int TW, int STRIDE, int PW, int PIECES, int PIECE>
static INLINE void run(const float* window, const uint16_t* offset, const float* value, int64_t n, vec (&a)[TH * TW]) {
  int64_t e = 0;
  if constexpr (TH * TW == 1) {  // one sum would wait for itself, and a loop over the rest would be mispredicted
    if (n == 0) return;
    vec s[4] = {};
    for (; e + 4 <= n; e += 4)
#pragma GCC unroll 4
      for (int u = 0; u < 4; u++) s[u] += value[e + u] * *(const vec*)(window + (int64_t)offset[e + u] * LANES);
#pragma GCC unroll 4
    for (int u = 0; u < 3; u++) {
      int32_t left = e + u < n;
      int64_t at = (e + u) * left;
      s[u] += keep((ivec){} - left, value[at] * *(const vec*)(window + (int64_t)offset[at] * LANES));
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
        a[i] += v * *(const vec*)(p + ((i / TW) * STRIDE * PW + (i % TW) * STRIDE) * LANES);
  }
}

// Sums over the lanes of LANES vectors, in one
static INLINE vec sums(const float* ring) {
  ivec even, odd;
  for (int l = 0; l < LANES; l++) even[l] = 2 * l, odd[l] = 2 * l + 1;
  vec t[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) t[i] = *(const vec*)(ring + i * LANES);
#pragma GCC unroll 4
  for (int n = LANES / 2; n; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) t[i] = pick(t[2 * i], t[2 * i + 1], even) + pick(t[2 * i], t[2 * i + 1], odd);
  return t[0];
}

// Products of a tile of dy with what entries see, summed over the tile; lane sums are added up for LANES entries at once
struct Ring {
  alignas(64) float kept[LANES * LANES];
  int64_t filled = 0;
  float* to;

  explicit Ring(float* to) : to(to) {}

  template <int TH, int TW, int STRIDE, int PW, int PIECES, int PIECE>
  INLINE void add(const float* window, const uint16_t* offset, int64_t n, const vec (&d)[TH * TW]) {
    int64_t at = filled;
    for (int64_t e = 0; e < n; e++) {
      const float* p = window + (int64_t)offset[e] * LANES;
      vec s[4] = {};
      int terms = 0;
#pragma GCC unroll 16
      for (int i = 0; i < TH * TW; i++) {
        if (!counts<TH, TW, PIECES>(PIECE, i)) continue;
        vec seen = *(const vec*)(p + ((i / TW) * STRIDE * PW + (i % TW) * STRIDE) * LANES);
        s[terms % 4] = terms < 4 ? d[i] * seen : s[terms % 4] + d[i] * seen;
        terms++;
      }
      *(vec*)(kept + at * LANES) = (s[0] + s[1]) + (s[2] + s[3]);
      if (++at == LANES) {
        store(sums(kept), LANES);
        at = 0;
      }
    }
    filled = at;
  }
  void finish() {
    if (filled) store(sums(kept), filled);
    filled = 0;
  }
  INLINE void store(vec v, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] += v[i];
    to += n;
  }
};

// y = convolution of x with the listed weights, plus bias, plus `add`, rectified
template <int TH, int TW, int STRIDE, int MORE, int PIECES>
static void convolve(const Convolution& g, const float* x, const int32_t* ptr, const uint16_t* offset,
                     const float* value, const float* bias, const float* add, bool relu, float* y) {
  constexpr int PH = (TH - 1) * STRIDE + 1 + MORE, PW = (TW - 1) * STRIDE + 1 + MORE, TILE = TH * TW;
  constexpr int PARTS = parts_of(STRIDE == 2 ? STRIDED : MORE);
  int64_t th = (g.tiles_h + TH - 1) / TH, tw = (g.tiles_w + TW - 1) / TW, blocks = (g.in + g.block - 1) / g.block;
  int64_t tiles = g.groups * th * tw, threads = at::get_num_threads();
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
            for (int i = 0; i < TILE; i++) a[i] = *(const vec*)(partial + (r * TILE + i) * LANES);
          }
          if (whole && far && b == blocks - 1 && r + 2 < last) {
            const float* soon = y + (((group * g.out + r + 2) * g.out_h + i0) * g.out_w + j0) * LANES;
#pragma GCC unroll 16
            for (int i = 0; i < TILE; i++) __builtin_prefetch(soon + (i / TW * g.out_w + i % TW) * LANES, 1);
          }
          each_piece<PARTS, PIECES>(list, [&]<int P>(int64_t e, int64_t n) __attribute__((always_inline)) {
            run<TH, TW, STRIDE, PW, PIECES, P>(window, offset + e, value + e, n, a);
          });
          if (b < blocks - 1) {
#pragma GCC unroll 16
            for (int i = 0; i < TILE; i++) *(vec*)(partial + (r * TILE + i) * LANES) = a[i];
            continue;
          }
          int64_t phase = r / g.out, ph = phase / g.phases, pw = phase % g.phases;
          int64_t plane = (group * g.out + r % g.out) * g.out_h * g.out_w;
          if (whole) {
            int64_t at = (plane + i0 * g.out_w + j0) * LANES;
#pragma GCC unroll 16
            for (int i = 0; i < TILE; i++) {
              int64_t to = at + (i / TW * g.out_w + i % TW) * LANES;
              vec out = add ? a[i] + *(const vec*)(add + to) : a[i];
              *(vec*)(y + to) = relu ? rectified(out) : out;
            }
            continue;
          }
#pragma GCC unroll 16
          for (int i = 0; i < TILE; i++) {
            int64_t row = (i0 + i / TW) * g.phases + ph, column = (j0 + i % TW) * g.phases + pw;
            if (row >= g.out_h || column >= g.out_w) continue;
            int64_t to = (plane + row * g.out_w + column) * LANES;
            vec out = add ? a[i] + *(const vec*)(add + to) : a[i];
            *(vec*)(y + to) = relu ? rectified(out) : out;
          }
        }
      }
    }
  });
}

// dvalue[e] = sum over tiles and lanes of dy times what entry e has seen. The work is divided in the same way for any
// number of threads, and so are the sums.
template <int TH, int TW, int STRIDE, int MORE, int PIECES>
static void correlate(const Convolution& g, const float* x, const float* dy, const int32_t* ptr, const uint16_t* offset,
                      float* dvalue) {
  constexpr int PH = (TH - 1) * STRIDE + 1 + MORE, PW = (TW - 1) * STRIDE + 1 + MORE, TILE = TH * TW;
  constexpr int PARTS = parts_of(STRIDE == 2 ? STRIDED : MORE);
  int64_t th = (g.tiles_h + TH - 1) / TH, tw = (g.tiles_w + TW - 1) / TW, blocks = (g.in + g.block - 1) / g.block;
  int64_t tiles = g.groups * th * tw, entries = ptr[blocks * g.rows * PARTS];
  int64_t chunks = std::clamp<int64_t>(tiles / 16, 1, 8), parts = std::min<int64_t>(16 / chunks, blocks);
  std::vector<float> sums(chunks * entries);
  share(chunks * parts, [&](int64_t begin, int64_t end) {
    float* window = scratch(g.block * PH * PW * LANES, 0);
    for (int64_t item = begin; item < end; item++) {
      int64_t chunk = item / parts, part = item % parts;
      for (int64_t tile = tiles * chunk / chunks; tile < tiles * (chunk + 1) / chunks; tile++)
        for (int64_t b = blocks * part / parts; b < blocks * (part + 1) / parts; b++) {
          int64_t j0 = tile % tw * TW, i0 = tile / tw % th * TH, group = tile / tw / th, c0 = b * g.block;
          bool whole = i0 + TH <= g.tiles_h && j0 + TW <= g.tiles_w;
          pack<PH, PW>(g, x + (group * g.in + c0) * g.h * g.w * LANES, std::min(g.block, g.in - c0),
                       i0 * STRIDE * g.step + g.origin_h, j0 * STRIDE * g.step + g.origin_w, window);
          const int32_t* list = ptr + b * g.rows * PARTS;
          int64_t first = blocks * part / parts, last = blocks * (part + 1) / parts;
          Ahead<PH, PW> ahead(g, x, tile, b, last, th, tw, TH * STRIDE, TW * STRIDE, first);
          Ring ring(sums.data() + chunk * entries + list[0]);
          for (int64_t r = 0; r < g.rows; r++, list += PARTS) {
            if (list[0] == list[PARTS]) continue;
            ahead.fetch((r + 1) * ahead.lines / g.rows);
            vec d[TILE];
            const float* at = dy + (((group * g.rows + r) * g.tiles_h + i0) * g.tiles_w + j0) * LANES;
            if (whole) {
              if (ahead.lines && r + 2 < g.rows) {
                const float* soon = at + 2 * g.tiles_h * g.tiles_w * LANES;
#pragma GCC unroll 16
                for (int i = 0; i < TILE; i++) __builtin_prefetch(soon + (i / TW * g.tiles_w + i % TW) * LANES);
              }
#pragma GCC unroll 16
              for (int i = 0; i < TILE; i++) d[i] = *(const vec*)(at + (i / TW * g.tiles_w + i % TW) * LANES);
            } else {
#pragma GCC unroll 16
              for (int i = 0; i < TILE; i++) {
                bool inside = i0 + i / TW < g.tiles_h && j0 + i % TW < g.tiles_w;
                d[i] = inside ? *(const vec*)(at + (i / TW * g.tiles_w + i % TW) * LANES) : (vec){};
              }
            }
            each_piece<PARTS, PIECES>(list, [&]<int P>(int64_t e, int64_t n) __attribute__((always_inline)) {
              ring.template add<TH, TW, STRIDE, PW, PIECES, P>(window, offset + e, n, d);
            });
          }
          ring.finish();
        }
    }
  });
  at::parallel_for(0, entries, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; e++) {
      float total = 0;
      for (int64_t c = 0; c < chunks; c++) total += sums[c * entries + e];
      dvalue[e] = total;
    }
  });
}

// Calls the kernel for a mode and the size of the output; `entries` tells whether lists are worth to be cut in 9
template <class Kernel>
static void dispatch(int64_t mode, const Convolution& g, int64_t entries, Kernel kernel) {
#define TILES(TH, TW)                                                    \
  switch (mode) {                                                        \
    case FLAT: return kernel.template operator()<TH, TW, 1, 0, 1>();     \
    case NEXT: return kernel.template operator()<TH, TW, 1, 1, 1>();     \
    case AROUND: return kernel.template operator()<TH, TW, 1, 2, 1>();   \
    default: return kernel.template operator()<TH, TW, 2, 2, 1>();       \
  }
  int64_t side = std::max(g.tiles_h, g.tiles_w), lists = (g.in + g.block - 1) / g.block * g.rows;
  if (side == 1) { TILES(1, 1) }
  if (side == 2) { TILES(2, 2) }
  if (mode == AROUND && g.alone(ROWS, COLUMNS)) {
    if (entries > 24 * lists) return kernel.template operator()<ROWS, COLUMNS, 1, 2, 9>();
    return kernel.template operator()<ROWS, COLUMNS, 1, 2, 3>();
  }
  TILES(ROWS, COLUMNS)
}

extern "C" {

int64_t lanes() { return LANES; }

// n times 16 multiply-adds of vectors in registers: what this CPU can do at best, to compare with
float multiply_adds(int64_t n) {
  vec a[16], x = 1e-30f - (vec){}, y = 0.5f - (vec){};
  for (int j = 0; j < 16; j++) a[j] = (float)j - (vec){};
  for (int64_t i = 0; i < n; i++) {
#pragma GCC unroll 16
    for (int j = 0; j < 16; j++) a[j] = a[j] * y + x;
  }
  vec all = {};
  for (int j = 0; j < 16; j++) all += a[j];
  return sum((const float*)&all);
}

// geometry: groups, in, rows, h, w, tiles_h, tiles_w, out_h, out_w, out, origin_h, origin_w, step, phases, block,
// images, grid rows, grid columns
static Convolution convolution(const int64_t* n) {
  return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], n[12], n[13], n[14],
          Grid(n[15], n[16], n[17])};
}

void sparse_convolve(int64_t mode, const int64_t* geometry, const float* x, const int32_t* ptr, const uint16_t* offset,
                     const float* value, const float* bias, const float* add, int64_t relu, float* y) {
  Convolution g = convolution(geometry);
  int64_t entries = ptr[(g.in + g.block - 1) / g.block * g.rows * parts_of(mode)];
  dispatch(mode, g, entries, [&]<int TH, int TW, int STRIDE, int MORE, int PIECES>() {
    convolve<TH, TW, STRIDE, MORE, PIECES>(g, x, ptr, offset, value, bias, add, relu != 0, y);
  });
}

void sparse_correlate(int64_t mode, const int64_t* geometry, const float* x, const float* dy, const int32_t* ptr,
                      const uint16_t* offset, float* dvalue) {
  Convolution g = convolution(geometry);
  dispatch(mode, g, 0, [&]<int TH, int TW, int STRIDE, int MORE, int PIECES>() {
    correlate<TH, TW, STRIDE, MORE, PIECES == 1 ? 1 : 3>(g, x, dy, ptr, offset, dvalue);
  });
}

// out[i] = from[index[i]]
void gather(const float* from, const int32_t* index, int64_t n, float* out) {
  at::parallel_for(0, n, 16384, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) out[i] = from[index[i]];
  });
}

// out[index[i]] = from[i]
void scatter(const float* from, const int32_t* index, int64_t n, float* out) {
  at::parallel_for(0, n, 16384, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) out[index[i]] = from[i];
  });
}

// The lists of a masked weight (out, in, k, k). Sizes: ptr blocks * out * parts + 1, back_ptr back_blocks * stride^2 *
// in * parts + 1. code: input channel in its block and tap; index: each entry's place in the weight's memory;
// back_code: output channel in its block and tap; back_from: each back entry's entry in the first list.
void build_lists(const uint8_t* mask, const int64_t* strides, int64_t out, int64_t in, int64_t k, int64_t stride,
                 int64_t padding, int64_t block, int64_t back_block, int32_t* ptr, uint16_t* code, int32_t* index,
                 int32_t* back_ptr, uint16_t* back_code, int32_t* back_from) {
  int64_t taps = k * k, blocks = (in + block - 1) / block, back_blocks = (out + back_block - 1) / back_block;
  int64_t rows = stride * stride * in;
  std::vector<int64_t> phase(taps);  // of the input pixels that a tap reads
  for (int64_t t = 0; t < taps; t++) {
    auto p = [&](int64_t tap) { return (tap + stride * padding - padding) % stride; };
    phase[t] = p(t / k) * stride + p(t % k);
  }
  int64_t parts = parts_of(stride == 1 && k == 3 ? AROUND : FLAT), lists = blocks * out * parts;
  int64_t back_lists = back_blocks * rows * parts;
  auto list = [&](int64_t o, int64_t c, int64_t t) { return (c / block * out + o) * parts + t % parts; };
  auto back_list = [&](int64_t o, int64_t c, int64_t t) {  // a gradient sees its window the other way round
    return (o / back_block * rows + phase[t] * in + c) * parts + (taps - 1 - t) % parts;
  };
  auto each = [&](auto f) {
    for (int64_t o = 0; o < out; o++)
      for (int64_t c = 0; c < in; c++)
        for (int64_t t = 0; t < taps; t++)
          if (mask[(o * in + c) * taps + t]) f(o, c, t);
  };
  std::fill(ptr, ptr + lists + 1, 0);
  std::fill(back_ptr, back_ptr + back_lists + 1, 0);
  each([&](int64_t o, int64_t c, int64_t t) { ptr[list(o, c, t) + 1]++, back_ptr[back_list(o, c, t) + 1]++; });
  for (int64_t i = 0; i < lists; i++) ptr[i + 1] += ptr[i];
  for (int64_t i = 0; i < back_lists; i++) back_ptr[i + 1] += back_ptr[i];
  std::vector<int32_t> at(ptr, ptr + lists), back(back_ptr, back_ptr + back_lists);
  each([&](int64_t o, int64_t c, int64_t t) {
    int32_t e = at[list(o, c, t)]++, f = back[back_list(o, c, t)]++;
    code[e] = c % block * taps + t;
    index[e] = o * strides[0] + c * strides[1] + t / k * strides[2] + t % k * strides[3];
    back_code[f] = o % back_block * taps + t;
    back_from[f] = e;
  });
}

// The place of each entry in the packed window of an output of so many pixels. back: of a gradient, whose window begins
// at `origin`.
void place(const uint16_t* code, int64_t n, int64_t k, int64_t mode, int64_t side, int64_t back, int64_t stride,
           int64_t padding, int64_t origin, int64_t block, uint16_t* offset) {
  int64_t more = mode == NEXT ? 1 : mode == FLAT ? 0 : 2, apart = mode == STRIDED ? 2 : 1, taps = k * k;
  int64_t th = side > 2 ? ROWS : side, tw = side > 2 ? COLUMNS : side;
  int64_t ph = (th - 1) * apart + 1 + more, pw = (tw - 1) * apart + 1 + more;
  std::vector<uint16_t> places(block * taps);
  auto seen = [&](int64_t tap) {  // by the output pixel: input pixel s * t + phase gets from output t + this
    int64_t phase = (tap + stride * padding - padding) % stride;
    return back ? (phase + padding - tap) / stride - origin : tap;
  };
  for (int64_t c = 0; c < block; c++)
    for (int64_t t = 0; t < taps; t++) places[c * taps + t] = (c * ph + seen(t / k)) * pw + seen(t % k);
  for (int64_t e = 0; e < n; e++) offset[e] = places[code[e]];
}

// y = (x - mean) * inverse * gamma + beta (+ add) (rectified); mean and inverse deviation are of the batch, and move the
// running ones where these are given
void norm_forward(const int64_t* shape, const float* x, const float* gamma, const float* beta, const float* add,
                  int64_t relu, double eps, double momentum, float* running_mean, float* running_var, float* mean,
                  float* inverse, float* y) {
  int64_t groups = shape[0], channels = shape[1], size = shape[2] * LANES;
  Grid grid(shape[3], shape[4], shape[5]);
  ivec valid = grid.valid();
  double count = (double)grid.images * grid.rows * grid.columns * shape[2];
  share(channels, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c++) {
      auto total = [&](vec m, bool squared) {
        double all = 0;
        for (int64_t g = 0; g < groups; g++) {
          vec s[4] = {};
          const float* p = x + (g * channels + c) * size;
          int64_t i = 0;
          for (; i + 4 * LANES <= size; i += 4 * LANES) {
#pragma GCC unroll 4
            for (int u = 0; u < 4; u++) {
              vec v = *(const vec*)(p + i + u * LANES) - m;
              s[u] += squared ? v * v : v;
            }
          }
          for (; i < size; i += LANES) {
            vec v = *(const vec*)(p + i) - m;
            s[0] += squared ? v * v : v;
          }
          vec t = (s[0] + s[1]) + (s[2] + s[3]);
          if (g == groups - 1) t = keep(valid, t);
          all += sum((const float*)&t);
        }
        return all;
      };
      vec none = {};
      float m = total(none, false) / count;
      double variance = total(m + none, true) / count;
      float inv = 1 / std::sqrt(variance + eps);
      mean[c] = m;
      inverse[c] = inv;
      if (running_mean) {
        running_mean[c] += momentum * (m - running_mean[c]);
        running_var[c] += momentum * (variance * count / std::max(count - 1, 1.) - running_var[c]);
      }
      float scale = (gamma ? gamma[c] : 1.f) * inv, shift = (beta ? beta[c] : 0.f) - scale * m;
      for (int64_t g = 0; g < groups; g++) {
        int64_t at = (g * channels + c) * size;
        for (int64_t i = at; i < at + size; i += LANES) {
          vec v = *(const vec*)(x + i) * scale + shift;
          if (add) v += *(const vec*)(add + i);
          *(vec*)(y + i) = relu ? rectified(v) : v;
        }
      }
    }
  });
}

// dx, dadd, dgamma, dbeta of the above, from dy and, where it was rectified after a sum, y.
void norm_backward(const int64_t* shape, const float* dy, const float* y, const float* x, const float* gamma,
                   const float* beta, const float* mean, const float* inverse, int64_t relu, float* dx, float* dadd,
                   float* dgamma, float* dbeta) {
  int64_t groups = shape[0], channels = shape[1], size = shape[2] * LANES;
  Grid grid(shape[3], shape[4], shape[5]);
  ivec valid = grid.valid();
  double count = (double)grid.images * grid.rows * grid.columns * shape[2];
  share(channels, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c++) {
      vec m = mean[c] - (vec){}, zero = {};
      float scale = (gamma ? gamma[c] : 1.f) * inverse[c], up = (beta ? beta[c] : 0.f) - scale * mean[c];
      auto passed = [&](int64_t i, vec seen) {  // the gradient that the ReLU lets through
        vec d = *(const vec*)(dy + i);
        if (!relu) return d;
        return keep((y ? *(const vec*)(y + i) : seen * scale + up) > zero, d);
      };
      double total = 0, total_x = 0;
      for (int64_t g = 0; g < groups; g++) {
        int64_t at = (g * channels + c) * size;
        vec t = {}, u = {}, t2 = {}, u2 = {};
        auto take = [&](int64_t i, vec& t, vec& u) {
          vec seen = *(const vec*)(x + i), d = passed(i, seen);
          t += d;
          u += d * (seen - m);
        };
        int64_t i = at;
        for (; i + 2 * LANES <= at + size; i += 2 * LANES) take(i, t, u), take(i + LANES, t2, u2);
        if (i < at + size) take(i, t, u);
        t += t2, u += u2;  // lanes that hold no image have dy = 0
        total += sum((const float*)&t);
        total_x += sum((const float*)&u);
      }
      total_x *= inverse[c];
      dgamma[c] = total_x;
      dbeta[c] = total;
      float shift = -scale * total / count, slope = -scale * inverse[c] * total_x / count;
      for (int64_t g = 0; g < groups; g++) {
        int64_t at = (g * channels + c) * size;
        ivec mask = g == groups - 1 ? valid : ~(ivec){};
        for (int64_t i = at; i < at + size; i += LANES) {
          vec seen = *(const vec*)(x + i), d = passed(i, seen);
          if (dadd) *(vec*)(dadd + i) = d;
          *(vec*)(dx + i) = keep(mask, d * scale + shift + (seen - m) * slope);
        }
      }
    }
  });
}
}
