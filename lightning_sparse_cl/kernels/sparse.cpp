// Training with unstructured-sparse convolutions and batch-norm on CPUs: what Python calls. See convolve.h for the layout.

#include <ATen/Parallel.h>
#include <cstdint>

static int64_t thread_count() { return at::get_num_threads(); }

template <class F>
static void on_threads(int64_t n, F f) {
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) f(i);
  });
}

#include "convolve.h"

// Sums over the lanes of LANES vectors, in one
static INLINE vec sums(const float* ring) {
  ivec even, odd;
  for (int l = 0; l < LANES; l++) even[l] = 2 * l, odd[l] = 2 * l + 1;
  vec t[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) t[i] = load(ring + i * LANES);
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
        vec seen = load(p + ((i / TW) * STRIDE * PW + (i % TW) * STRIDE) * LANES);
        s[terms % 4] = terms < 4 ? d[i] * seen : s[terms % 4] + d[i] * seen;
        terms++;
      }
      store(kept + at * LANES, (s[0] + s[1]) + (s[2] + s[3]));
      if (++at == LANES) {
        write(sums(kept), LANES);
        at = 0;
      }
    }
    filled = at;
  }
  void finish() {
    if (filled) write(sums(kept), filled);
    filled = 0;
  }
  INLINE void write(vec v, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] += v[i];
    to += n;
  }
};

// dvalue[e] = sum over tiles and lanes of dy times what entry e has seen. The sums are divided in the same way for any
// number of threads; where there are more threads than such parts, each part has its rows divided.
template <int TH, int TW, int STRIDE, int MORE, int PIECES>
static void correlate(const Convolution& g, const float* x, const float* dy, const int32_t* ptr, const uint16_t* offset,
                      float* dvalue) {
  constexpr int PH = (TH - 1) * STRIDE + 1 + MORE, PW = (TW - 1) * STRIDE + 1 + MORE, TILE = TH * TW;
  constexpr int PARTS = parts_of(STRIDE == 2 ? STRIDED : MORE);
  int64_t th = (g.tiles_h + TH - 1) / TH, tw = (g.tiles_w + TW - 1) / TW, blocks = (g.in + g.block - 1) / g.block;
  int64_t tiles = g.groups * th * tw, entries = ptr[blocks * g.rows * PARTS];
  int64_t chunks = std::clamp<int64_t>(tiles / 16, 1, 8), parts = std::min<int64_t>(16 / chunks, blocks);
  int64_t most = std::max<int64_t>(1, g.rows / 16);
  int64_t splits = std::clamp<int64_t>((thread_count() + chunks * parts - 1) / (chunks * parts), 1, most);
  std::vector<float> sums(chunks * entries);
  share(chunks * parts * splits, [&](int64_t begin, int64_t end) {
    float* window = scratch(g.block * PH * PW * LANES, 0);
    for (int64_t item = begin; item < end; item++) {
      int64_t chunk = item / splits / parts, part = item / splits % parts, split = item % splits;
      int64_t from = g.rows * split / splits, until = g.rows * (split + 1) / splits;
      for (int64_t tile = tiles * chunk / chunks; tile < tiles * (chunk + 1) / chunks; tile++)
        for (int64_t b = blocks * part / parts; b < blocks * (part + 1) / parts; b++) {
          int64_t j0 = tile % tw * TW, i0 = tile / tw % th * TH, group = tile / tw / th, c0 = b * g.block;
          bool whole = i0 + TH <= g.tiles_h && j0 + TW <= g.tiles_w;
          pack<PH, PW>(g, x + (group * g.in + c0) * g.h * g.w * LANES, std::min(g.block, g.in - c0),
                       i0 * STRIDE * g.step + g.origin_h, j0 * STRIDE * g.step + g.origin_w, window);
          const int32_t* list = ptr + (b * g.rows + from) * PARTS;
          int64_t first = blocks * part / parts, last = blocks * (part + 1) / parts;
          Ahead<PH, PW> ahead(g, x, tile, b, last, th, tw, TH * STRIDE, TW * STRIDE, first);
          Ring ring(sums.data() + chunk * entries + list[0]);
          for (int64_t r = from; r < until; r++, list += PARTS) {
            if (list[0] == list[PARTS]) continue;
            ahead.fetch((r - from + 1) * ahead.lines / (until - from));
            vec d[TILE];
            const float* at = dy + (((group * g.rows + r) * g.tiles_h + i0) * g.tiles_w + j0) * LANES;
            if (whole) {
              if (ahead.lines && r + 2 < until) {
                const float* soon = at + 2 * g.tiles_h * g.tiles_w * LANES;
#pragma GCC unroll 16
                for (int i = 0; i < TILE; i++) __builtin_prefetch(soon + (i / TW * g.tiles_w + i % TW) * LANES);
              }
#pragma GCC unroll 16
              for (int i = 0; i < TILE; i++) d[i] = load(at + (i / TW * g.tiles_w + i % TW) * LANES);
            } else {
#pragma GCC unroll 16
              for (int i = 0; i < TILE; i++) {
                bool inside = i0 + i / TW < g.tiles_h && j0 + i % TW < g.tiles_w;
                d[i] = inside ? load(at + (i / TW * g.tiles_w + i % TW) * LANES) : (vec){};
              }
            }
            each_piece<PARTS, PIECES>(list, [&](auto piece, int64_t e, int64_t n) __attribute__((always_inline)) {
              ring.template add<TH, TW, STRIDE, PW, PIECES, decltype(piece)::value>(window, offset + e, n, d);
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

extern "C" {

int64_t lanes() { return LANES; }
int64_t side(int64_t mode, int64_t h, int64_t w, int64_t whole) { return side_of(mode, h, w, whole != 0); }
int64_t block(int64_t mode, int64_t side, double density) { return block_of(mode, side, density); }

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
  return sum(all);
}

// geometry: groups, in, rows, h, w, tiles_h, tiles_w, out_h, out_w, out, origin_h, origin_w, step, phases, block,
// images, grid rows, grid columns
static Convolution convolution(const int64_t* n) {
  return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], n[12], n[13], n[14],
          Grid(n[15], n[16], n[17])};
}

void sparse_convolve(int64_t mode, const int64_t* geometry, const float* x, const int32_t* ptr, const uint16_t* offset,
                     const float* value, const float* bias, const float* add, int64_t relu, float* y) {
  convolve(mode, convolution(geometry), x, ptr, offset, value, bias, add, relu != 0, y);
}

void sparse_correlate(int64_t mode, const int64_t* geometry, const float* x, const float* dy, const int32_t* ptr,
                      const uint16_t* offset, float* dvalue) {
  Convolution g = convolution(geometry);
  dispatch(mode, g, 0, [&](auto tile) {
    using T = decltype(tile);
    correlate<T::TH, T::TW, T::STRIDE, T::MORE, T::PIECES == 1 ? 1 : 3>(g, x, dy, ptr, offset, dvalue);
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
  int64_t ph = (rows_of(side) - 1) * apart + 1 + more, pw = (columns_of(side) - 1) * apart + 1 + more;
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
              vec v = load(p + i + u * LANES) - m;
              s[u] += squared ? v * v : v;
            }
          }
          for (; i < size; i += LANES) {
            vec v = load(p + i) - m;
            s[0] += squared ? v * v : v;
          }
          vec t = (s[0] + s[1]) + (s[2] + s[3]);
          if (g == groups - 1) t = keep(valid, t);
          all += sum(t);
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
          vec v = load(x + i) * scale + shift;
          if (add) v += load(add + i);
          store(y + i, relu ? rectified(v) : v);
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
        vec d = load(dy + i);
        if (!relu) return d;
        return keep((y ? load(y + i) : seen * scale + up) > zero, d);
      };
      double total = 0, total_x = 0;
      for (int64_t g = 0; g < groups; g++) {
        int64_t at = (g * channels + c) * size;
        vec t = {}, u = {}, t2 = {}, u2 = {};
        auto take = [&](int64_t i, vec& t, vec& u) {
          vec seen = load(x + i), d = passed(i, seen);
          t += d;
          u += d * (seen - m);
        };
        int64_t i = at;
        for (; i + 2 * LANES <= at + size; i += 2 * LANES) take(i, t, u), take(i + LANES, t2, u2);
        if (i < at + size) take(i, t, u);
        t += t2, u += u2;  // lanes that hold no image have dy = 0
        total += sum(t);
        total_x += sum(u);
      }
      total_x *= inverse[c];
      dgamma[c] = total_x;
      dbeta[c] = total;
      float shift = -scale * total / count, slope = -scale * inverse[c] * total_x / count;
      for (int64_t g = 0; g < groups; g++) {
        int64_t at = (g * channels + c) * size;
        ivec mask = g == groups - 1 ? valid : ~(ivec){};
        for (int64_t i = at; i < at + size; i += LANES) {
          vec seen = load(x + i), d = passed(i, seen);
          if (dadd) store(dadd + i, d);
          store(dx + i, keep(mask, d * scale + shift + (seen - m) * slope));
        }
      }
    }
  });
}
}
