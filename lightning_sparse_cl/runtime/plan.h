// How a network runs with vectors of LANES numbers: which memory and which lists each layer has, and the layers.
// Included after convolve.h, once for each kind of vectors.

namespace {

// -- the plan -----------------------------------------------------------------------------------------------------

struct Parts {  // into how many each image is cut
  int64_t rows, columns;
  bool operator==(const Parts& o) const { return rows == o.rows && columns == o.columns; }
  bool one() const { return rows * columns == 1; }
  int64_t each() const { return LANES / (rows * columns); }  // images in a group
  int64_t groups(int64_t images) const { return (images + each() - 1) / each(); }
};

// A value in blocks: where, and how
struct Blocked {
  Shape shape;
  Parts parts;
  int64_t height, width;  // of a part
  int64_t groups, place, first, last;  // place in memory, in floats; steps that write it first and read it last
  int64_t plane() const { return height * width * LANES; }
  int64_t size() const { return groups * shape.channels * plane(); }
  // Of a pixel of the first channel
  int64_t at(int64_t image, int64_t row, int64_t column) const {
    int64_t part = row / height * parts.columns + column / width;
    int64_t lane = image % parts.each() * parts.rows * parts.columns + part;
    int64_t pixel = row % height * width + column % width;
    return image / parts.each() * shape.channels * plane() + pixel * LANES + lane;
  }
};

// Where the numbers of a channel are read and written; lanes that hold no image are left as they are
struct Moves {
  std::vector<int64_t> from, to;
  int64_t from_channel, to_channel;  // from one channel to the next

  template <class T, class F>
  void run(int64_t channels, const T* x, float* y, F convert) const {
    for (int64_t c = 0; c < channels; c++, x += from_channel, y += to_channel)
      for (size_t i = 0; i < from.size(); i++) y[to[i]] = convert(x[from[i]], c);
  }
};

enum Act { TAKE, GIVE, REGRID, SPARSE, WINDOWED, DOT, COMBINE, POOL, AVERAGE, NORMALISE };

struct Step {
  Act act;
  const Layer* layer;
  int64_t x, other, y;  // numbers of blocked values; -1 where there is none
  Moves moves;
  int64_t work;  // multiply-adds of vectors, or about as much else
  int64_t mode;
  std::unique_ptr<Convolution> about;
  std::unique_ptr<Grid> grid;
  std::vector<int32_t> ptr, place;
  std::vector<uint16_t> offset;
  std::vector<float> value;
};

class Plan : public Runner {
 public:
  Plan(const Network& network, int64_t images) : images(images), network(network) {}
  void run(const float* floats, const uint8_t* bytes, float* outputs) override;

  int64_t images;
  std::vector<Blocked> values;
  std::vector<Step> steps;
  std::list<Layer> pools;  // the two steps of poolings that are done in two
  std::vector<float> memory;
  float* at(int64_t value) {
    float* begin = (float*)(((uintptr_t)memory.data() + 63) / 64 * 64);
    return begin + values[value].place;
  }

 private:
  const Network& network;
};

bool is_windowed(const Layer& l) { return l.kind == CONVOLUTION || l.kind == MAX_POOL || l.kind == MEAN_POOL; }

// Up to whole pairs of vectors
int64_t rounded(int64_t size) { return (size + 2 * LANES - 1) / (2 * LANES) * 2 * LANES; }

// Whether parts of an image stay parts of it, if the stride divides them
bool keeps_parts(const Layer& l) {
  if (!is_windowed(l)) return l.kind != LINEAR && l.kind != UNIT;
  return 2 * l.padding == l.dilation * (l.kernel - 1) || (l.kernel == l.stride && l.padding == 0 && l.dilation == 1);
}

bool fits(const Layer& l, Shape s, Parts p) {
  if (p.one()) return true;
  if (!keeps_parts(l)) return false;
  if (!is_windowed(l)) return true;
  int64_t h = s.height / p.rows, w = s.width / p.columns;
  return h % l.stride == 0 && w % l.stride == 0 && l.padding <= std::min(h, w);
}

// Small batches fill the lanes with parts of each image, which stay whole pixels down to images of 4x4
Parts parts_for(const Layer& l, Shape s, int64_t images) {
  int64_t stride = is_windowed(l) ? l.stride : 1;
  if (!keeps_parts(l) || s.height % stride || s.width % stride) return {1, 1};
  int64_t down = stride * std::max<int64_t>(1, std::min(s.height, s.width) / 4 / stride);
  while (is_windowed(l) && down < l.padding) down *= 2;
  Parts p = {1, 1};
  while (images * p.rows * p.columns < LANES) {
    bool high = s.height % (2 * p.rows * down) == 0, wide = s.width % (2 * p.columns * down) == 0;
    if (high && (p.rows <= p.columns || !wide)) p.rows *= 2;
    else if (wide) p.columns *= 2;
    else break;
  }
  return fits(l, s, p) ? p : Parts{1, 1};
}

class Planner {
 public:
  Planner(const Network& network, int64_t images, bool channels_last)
      : network(network), images(images), channels_last(channels_last), found(network.shapes.size()) {}

  std::unique_ptr<Plan> plan() {
    made = std::make_unique<Plan>(network, images);
    for (size_t i = 0; i < network.layers.size(); i++) add(network.layers[i], (int64_t)i + 1);
    int64_t last = network.shapes.size() - 1;
    Step give = step(GIVE, nullptr, found[last].front());
    Shape s = network.shapes[last];
    const Blocked& from = made->values[give.x];
    give.moves = moves(s, from.plane(), s.pixels(), [&](int64_t image, int64_t row, int64_t column) {
      return std::make_pair(from.at(image, row, column), image * s.size() + row * s.width + column);
    });
    made->steps.push_back(std::move(give));
    place_values();
    return std::move(made);
  }

 private:
  const Network& network;
  int64_t images;
  bool channels_last;
  std::vector<std::vector<int64_t>> found;  // of each of the network's values, the blocked ones
  std::unique_ptr<Plan> made;

  Step step(Act act, const Layer* layer, int64_t x, int64_t other = -1) {
    Step s{};
    s.act = act, s.layer = layer, s.x = x, s.other = other, s.y = -1;
    return s;
  }

  int64_t value(Shape shape, Parts parts) {
    int64_t height = shape.height / parts.rows, width = shape.width / parts.columns;
    made->values.push_back({shape, parts, height, width, parts.groups(images), 0, -1, -1});
    return made->values.size() - 1;
  }

  // f(image, row, column): where a pixel of the first channel is read and written
  template <class F>
  Moves moves(Shape s, int64_t from_channel, int64_t to_channel, F f) {
    Moves m;
    m.from_channel = from_channel, m.to_channel = to_channel;
    for (int64_t i = 0; i < images; i++)
      for (int64_t row = 0; row < s.height; row++)
        for (int64_t column = 0; column < s.width; column++) {
          auto [from, to] = f(i, row, column);
          m.from.push_back(from), m.to.push_back(to);
        }
    return m;
  }

  // A value of the network in so many parts
  int64_t in(int64_t v, Parts parts) {
    for (int64_t b : found[v])
      if (made->values[b].parts == parts) return b;
    int64_t b = v == 0 ? take(parts) : regrid(found[v].front(), parts);
    found[v].push_back(b);
    return b;
  }

  int64_t take(Parts parts) {
    Shape s = network.shapes[0];
    Step move = step(TAKE, nullptr, -1);
    move.y = value(s, parts);
    const Blocked& to = made->values[move.y];
    int64_t pixel = channels_last ? s.channels : 1;
    move.moves = moves(s, channels_last ? 1 : s.pixels(), to.plane(), [&](int64_t i, int64_t row, int64_t column) {
      return std::make_pair(i * s.size() + (row * s.width + column) * pixel, to.at(i, row, column));
    });
    made->steps.push_back(std::move(move));
    return made->steps.back().y;
  }

  int64_t regrid(int64_t x, Parts parts) {
    Shape s = made->values[x].shape;
    Step move = step(REGRID, nullptr, x);
    move.y = value(s, parts);
    const Blocked &from = made->values[x], &to = made->values[move.y];
    move.moves = moves(s, from.plane(), to.plane(), [&](int64_t i, int64_t row, int64_t column) {
      return std::make_pair(from.at(i, row, column), to.at(i, row, column));
    });
    made->steps.push_back(std::move(move));
    return made->steps.back().y;
  }

  // Whether a pooling of windows larger than the parts of its input was planned in two steps: of each part, which leaves
  // few numbers to be laid out anew, and of what is left
  bool pool_twice(const Layer& l, int64_t made_value) {
    bool apart = (l.kind == MAX_POOL || l.kind == MEAN_POOL) && l.kernel == l.stride && !l.padding && l.dilation == 1;
    if (!apart || found[l.input].empty()) return false;
    int64_t x = found[l.input].front();
    Blocked from = made->values[x];
    int64_t side = from.height;
    if (from.parts.one() || side != from.width || side < 2 || l.kernel == side || l.kernel % side) return false;
    Shape s = {from.shape.channels, from.parts.rows, from.parts.columns}, after = network.shapes[made_value];
    if (after.height * l.kernel != from.shape.height || after.width * l.kernel != from.shape.width) return false;
    for (bool within : {true, false}) {
      Layer part = l;
      part.kernel = part.stride = (int32_t)(within ? side : l.kernel / side);
      if (within) part.low = -std::numeric_limits<float>::infinity(), part.high = -part.low;
      made->pools.push_back(part);
      if (!within) x = regrid(x, parts_for(made->pools.back(), s, images));
      Parts parts = made->values[x].parts;
      Step own = step(POOL, &made->pools.back(), x);
      own.y = value(within ? s : after, parts);
      own.grid = std::make_unique<Grid>(images, parts.rows, parts.columns);
      own.work = made->values[x].size() / LANES;
      made->steps.push_back(std::move(own));
      x = made->steps.back().y;
    }
    found[made_value].push_back(x);
    return true;
  }

  void add(const Layer& l, int64_t made_value) {
    if (pool_twice(l, made_value)) return;
    Shape s = network.shapes[l.input], after = network.shapes[made_value];
    Parts parts = found[l.input].empty() ? parts_for(l, s, images) : made->values[found[l.input].front()].parts;
    if (!fits(l, s, parts)) parts = parts_for(l, s, images);
    if (l.kind == LINEAR || l.kind == UNIT) parts = {1, 1};
    int64_t x = in(l.input, parts);
    Parts out = l.kind == LINEAR || l.kind == MEAN ? Parts{1, 1} : parts;
    int64_t other = l.other < 0 ? -1 : in(l.other, out);
    static const Act acts[] = {SPARSE, SPARSE, COMBINE, COMBINE, COMBINE, POOL, POOL, AVERAGE, NORMALISE};
    Step own = step(acts[l.kind], &l, x, other);
    bool special = l.groups == 1 && l.dilation == 1 && l.padding < l.kernel &&
                   ((l.kernel == 1 && l.stride <= 2) || (l.kernel == 3 && l.stride <= 2));
    if (l.kind == CONVOLUTION && !special) own.act = WINDOWED;
    // Rows of a weight that is not sparse: lanes for inputs are faster than lanes for images where these are few
    bool dense = l.kind == LINEAR && images * s.size() * l.out < (int64_t)l.count * (LANES / 2);
    if (dense) own.act = DOT;
    own.y = value(after, out);
    own.grid = std::make_unique<Grid>(images, parts.rows, parts.columns);
    if (own.act == SPARSE) list(own);
    if (own.act == WINDOWED) list_windowed(own);
    if (own.act == DOT) {
      int64_t row = rounded(s.size());
      own.value.assign(l.out * row, 0);
      network.each(l, [&](int64_t o, int64_t c, int64_t, float value) { own.value[o * row + c] = value; });
    }
    const Blocked& y = made->values[own.y];
    own.work = own.act == SPARSE || own.act == WINDOWED ? (int64_t)l.count * y.groups * y.height * y.width
                                                        : made->values[x].size() / LANES;
    made->steps.push_back(std::move(own));
    found[made_value].push_back(made->steps.back().y);
  }

  void list(Step& s) {
    const Layer& l = *s.layer;
    Blocked x = made->values[s.x], y = made->values[s.y];
    bool linear = l.kind == LINEAR;
    int64_t kernel = linear ? 1 : l.kernel, stride = linear ? 1 : l.stride, padding = linear ? 0 : l.padding;
    int64_t inputs = linear ? x.shape.size() : l.in, taps = kernel * kernel;
    s.mode = kernel == 1 ? FLAT : stride == 1 ? AROUND : STRIDED;
    int64_t whole = std::max<int64_t>(1, l.out * inputs * taps);
    int64_t side = side_of(s.mode, y.height, y.width, y.parts.one());
    int64_t own = std::min(block_of(s.mode, side, (double)l.count / whole), inputs);
    int64_t h = linear ? 1 : x.height, w = linear ? 1 : x.width;
    s.about.reset(new Convolution{x.groups, inputs, l.out, h, w, y.height, y.width, y.height, y.width, l.out,
                                  -padding, -padding, kernel == 1 ? stride : 1, 1, own, *s.grid});
    int64_t parts = parts_of(s.mode), blocks = (inputs + own - 1) / own, lists = blocks * l.out * parts;
    auto list_of = [&](int64_t o, int64_t c, int64_t t) { return (c / own * l.out + o) * parts + t % parts; };
    s.ptr.assign(lists + 1, 0);
    network.each(l, [&](int64_t o, int64_t c, int64_t t, float) { s.ptr[list_of(o, c, t) + 1]++; });
    for (int64_t i = 0; i < lists; i++) s.ptr[i + 1] += s.ptr[i];
    std::vector<int32_t> next(s.ptr.begin(), s.ptr.end());
    s.offset.resize(l.count), s.value.resize(l.count);
    int64_t apart = s.mode == STRIDED ? 2 : 1, more = s.mode == FLAT ? 0 : 2;
    int64_t high = (rows_of(side) - 1) * apart + 1 + more, wide = (columns_of(side) - 1) * apart + 1 + more;
    network.each(l, [&](int64_t o, int64_t c, int64_t t, float value) {
      int32_t e = next[list_of(o, c, t)]++;
      s.offset[e] = (uint16_t)((c % own * high + t / kernel) * wide + t % kernel);
      s.value[e] = value;
    });
  }

  void list_windowed(Step& s) {
    const Layer& l = *s.layer;
    Blocked x = made->values[s.x];
    int64_t high = x.height + 2 * l.padding, wide = x.width + 2 * l.padding;
    s.ptr.assign(l.out + 1, 0);
    network.each(l, [&](int64_t o, int64_t c, int64_t t, float value) {
      s.ptr[o + 1]++;
      s.place.push_back((int32_t)((c * high + t / l.kernel * l.dilation) * wide + t % l.kernel * l.dilation));
      s.value.push_back(value);
    });
    for (int64_t o = 0; o < l.out; o++) s.ptr[o + 1] += s.ptr[o];
  }

  // Values that are not needed at the same time share memory
  void place_values() {
    auto& values = made->values;
    for (size_t i = 0; i < made->steps.size(); i++) {
      const Step& s = made->steps[i];
      if (s.y >= 0) values[s.y].first = values[s.y].last = i;
      for (int64_t read : {s.x, s.other})
        if (read >= 0) values[read].last = i;
    }
    int64_t most = 0;
    for (size_t v = 0; v < values.size(); v++) {
      int64_t at = 0, size = values[v].size();
      for (bool moved = true; moved;) {
        moved = false;
        for (size_t o = 0; o < v; o++) {
          bool together = values[o].first <= values[v].last && values[v].first <= values[o].last;
          if (together && values[o].place < at + size && at < values[o].place + values[o].size()) {
            at = values[o].place + values[o].size(), moved = true;
          }
        }
      }
      values[v].place = at;
      most = std::max(most, at + size);
    }
    made->memory.assign(most + 16, 0);
  }
};

// -- the steps ----------------------------------------------------------------------------------------------------

INLINE vec clamped(vec v, float low, float high) {
  vec l = low - (vec){}, h = high - (vec){};
  v = (vec)(((ivec)(v < l) & (ivec)l) | (~(ivec)(v < l) & (ivec)v));  // NaN stays
  return (vec)(((ivec)(v > h) & (ivec)h) | (~(ivec)(v > h) & (ivec)v));
}

// A plane of h x w pixels with `around` more on each side: those of the neighbouring parts, `fill` outside of the image
void surround(const Grid& grid, const float* x, int64_t h, int64_t w, int64_t around, float fill, float* out) {
  bool cut = grid.rows * grid.columns > 1;
  vec empty = fill - (vec){};
  for (int64_t i = -around; i < h + around; i++)
    for (int64_t j = -around; j < w + around; j++, out += LANES) {
      int a = i < 0 ? -1 : i >= h, b = j < 0 ? -1 : j >= w;
      if (!a && !b) store(out, load(x + (i * w + j) * LANES));
      else if (!cut) store(out, empty);
      else store(out, pick(load(x + ((i - a * h) * w + j - b * w) * LANES), empty, grid.shift[a + 1][b + 1]));
    }
}

void run_windowed(const Network& n, const Step& s, const Blocked& x, const Blocked& y, const float* from,
                  const float* add, float* to) {
  const Layer& l = *s.layer;
  int64_t h = x.height + 2 * l.padding, w = x.width + 2 * l.padding, ins = l.in / l.groups, outs = l.out / l.groups;
  const float* bias = n.floats(l.rest);
  int64_t splits = l.groups == 1 ? std::min<int64_t>(thread_count(), outs) : 1;
  share(x.groups * l.groups * splits, [&](int64_t begin, int64_t end) {
    float* planes = scratch(ins * h * w * LANES, 0);
    for (int64_t item = begin; item < end; item++) {
      int64_t split = item % splits, part = item / splits % l.groups, group = item / splits / l.groups;
      for (int64_t c = 0; c < ins; c++)
        surround(*s.grid, from + (group * l.in + part * ins + c) * x.plane(), x.height, x.width, l.padding, 0,
                 planes + c * h * w * LANES);
      for (int64_t o = part * outs + outs * split / splits; o < part * outs + outs * (split + 1) / splits; o++)
        for (int64_t i = 0; i < y.height; i++)
          for (int64_t j = 0; j < y.width; j += COLUMNS) {
            int64_t some = std::min<int64_t>(COLUMNS, y.width - j), apart = l.stride * LANES;
            const float* seen = planes + (i * l.stride * w + j * l.stride) * LANES;
            vec a[COLUMNS];
            for (int u = 0; u < COLUMNS; u++) a[u] = bias[o] - (vec){};
            if (some == COLUMNS) {
              for (int32_t e = s.ptr[o]; e < s.ptr[o + 1]; e++)
                for (int u = 0; u < COLUMNS; u++)
                  a[u] += s.value[e] * load(seen + (int64_t)s.place[e] * LANES + u * apart);
            } else {
              for (int32_t e = s.ptr[o]; e < s.ptr[o + 1]; e++)
                for (int64_t u = 0; u < some; u++)
                  a[u] += s.value[e] * load(seen + (int64_t)s.place[e] * LANES + u * apart);
            }
            int64_t at = (group * l.out + o) * y.plane() + (i * y.width + j) * LANES;
            for (int64_t u = 0; u < some; u++) {
              vec v = add ? a[u] + load(add + at + u * LANES) : a[u];
              store(to + at + u * LANES, l.rectified ? rectified(v) : v);
            }
          }
    }
  });
}

void run_dot(const Network& n, const Step& s, const Blocked& x, int64_t images, const float* from, float* to) {
  const Layer& l = *s.layer;
  int64_t inputs = x.shape.size(), row = rounded(inputs);
  const float* bias = n.floats(l.rest);
  float* own = scratch(row, 0);
  for (int64_t image = 0; image < images; image++) {
    const float* at = from + image / LANES * inputs * LANES + image % LANES;
    for (int64_t i = 0; i < inputs; i++) own[i] = at[i * LANES];
    std::fill(own + inputs, own + row, 0.f);
    for (int64_t o = 0; o < l.out; o++) {
      vec all[2] = {};
      const float* weight = s.value.data() + o * row;
      for (int64_t i = 0; i < row; i += 2 * LANES) {
        all[0] += load(weight + i) * load(own + i);
        all[1] += load(weight + i + LANES) * load(own + i + LANES);
      }
      vec both = all[0] + all[1];
      float found = sum(both) + bias[o];
      to[image / LANES * l.out * LANES + o * LANES + image % LANES] = l.rectified && !(found >= 0) && found == found ? 0 : found;
    }
  }
}

void run_pool(const Step& s, const Blocked& x, const Blocked& y, const float* from, float* to) {
  const Layer& l = *s.layer;
  bool max = l.kind == MAX_POOL;
  int64_t w = x.width + 2 * l.padding, h = x.height + 2 * l.padding;
  float each = 1.f / ((float)l.kernel * l.kernel);
  share(x.groups * l.in, [&](int64_t begin, int64_t end) {
    float* plane = l.padding ? scratch(h * w * LANES, 0) : nullptr;
    for (int64_t c = begin; c < end; c++) {
      const float* seen = from + c * x.plane();
      if (plane) {
        float fill = max ? -std::numeric_limits<float>::infinity() : 0;
        surround(*s.grid, seen, x.height, x.width, l.padding, fill, plane);
        seen = plane;
      }
      for (int64_t i = 0; i < y.height; i++)
        for (int64_t j = 0; j < y.width; j++) {
          const float* at = seen + (i * l.stride * w + j * l.stride) * LANES;
          vec v = load(at);
          for (int64_t a = 0; a < l.kernel; a++)
            for (int64_t b = a == 0; b < l.kernel; b++) {
              vec u = load(at + (a * w + b) * LANES);
              ivec less = (ivec)~(u <= v) & (ivec) ~((ivec)(v != v));  // NaN stays
              v = max ? (vec)((less & (ivec)u) | (~less & (ivec)v)) : v + u;
            }
          store(to + c * y.plane() + (i * y.width + j) * LANES, max ? v : v * each);
        }
    }
  });
}

void run_mean(const Blocked& x, const Blocked& y, int64_t images, const float* from, float* to) {
  int64_t channels = x.shape.channels, each = x.parts.each(), cut = x.parts.rows * x.parts.columns;
  std::memset(to, 0, y.size() * sizeof(float));
  share(channels, [&](int64_t begin, int64_t end) {
    for (int64_t g = 0; g < x.groups; g++)
      for (int64_t c = begin; c < end; c++) {
        const float* at = from + (g * channels + c) * x.plane();
        vec sum = {};
        for (int64_t i = 0; i < x.plane(); i += LANES) sum += load(at + i);
        for (int64_t i = 0; i < each && g * each + i < images; i++) {
          float all = 0;
          for (int64_t p = 0; p < cut; p++) all += sum[i * cut + p];
          int64_t image = g * each + i;
          to[(image / LANES * channels + c) * LANES + image % LANES] = all / x.shape.pixels();
        }
      }
  });
}

// Each image's numbers divided by the root of the sum of their squares
void run_unit(const Blocked& x, const float* from, float* to) {
  int64_t size = x.shape.channels * x.plane();
  for (int64_t g = 0; g < x.groups; g++, from += size, to += size) {
    vec squares = {};
    for (int64_t i = 0; i < size; i += LANES) squares += load(from + i) * load(from + i);
    for (int l = 0; l < LANES; l++) squares[l] = 1 / std::max(std::sqrt(squares[l]), 1e-12f);
    for (int64_t i = 0; i < size; i += LANES) store(to + i, load(from + i) * squares);
  }
}

void run_combine(const Network& n, const Step& s, const Blocked& x, const float* from, const float* add, float* to) {
  const Layer& l = *s.layer;
  const float* numbers = l.kind == AFFINE ? n.floats(l.rest) : nullptr;
  share(x.groups * l.out, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c++) {
      float scale = numbers ? numbers[c % l.out] : 1, shift = numbers ? numbers[l.out + c % l.out] : 0;
      for (int64_t i = c * x.plane(); i < (c + 1) * x.plane(); i += LANES) {
        vec v = load(from + i);
        if (numbers) v = v * scale + shift;
        if (add) v += load(add + i);
        store(to + i, l.rectified ? rectified(v) : v);
      }
    }
  });
}

void clamp_all(const Layer& l, float* y, int64_t size) {
  if (!(l.low > -std::numeric_limits<float>::infinity()) && !(l.high < std::numeric_limits<float>::infinity())) return;
  for (int64_t i = 0; i < size; i += LANES) store(y + i, clamped(load(y + i), l.low, l.high));
}

void Plan::run(const float* floats, const uint8_t* bytes, float* outputs) {
  const Network& n = network;
  auto same = [](float v, int64_t) { return v; };
  for (const Step& s : steps) {
    const float* x = s.x < 0 ? nullptr : at(s.x);
    const float* add = s.other < 0 ? nullptr : at(s.other);
    float* y = s.y < 0 ? nullptr : at(s.y);
    SingleThread alone(s.work < PAYS);
    switch (s.act) {
      case TAKE:
        if (floats) s.moves.run(n.shapes[0].channels, floats, y, same);
        else s.moves.run(n.shapes[0].channels, bytes, y, [&](uint8_t v, int64_t c) { return v * n.scale[c] + n.shift[c]; });
        break;
      case REGRID: s.moves.run(values[s.y].shape.channels, x, y, same); break;
      case SPARSE:
        convolve(s.mode, *s.about, x, s.ptr.data(), s.offset.data(), s.value.data(), n.floats(s.layer->rest), add,
                 s.layer->rectified, y);
        break;
      case WINDOWED: run_windowed(n, s, values[s.x], values[s.y], x, add, y); break;
      case DOT: run_dot(n, s, values[s.x], images, x, y); break;
      case COMBINE: run_combine(n, s, values[s.x], x, add, y); break;
      case POOL: run_pool(s, values[s.x], values[s.y], x, y); break;
      case AVERAGE: run_mean(values[s.x], values[s.y], images, x, y); break;
      case NORMALISE: run_unit(values[s.x], x, y); break;
      case GIVE: s.moves.run(n.shapes.back().channels, x, outputs, same);
    }
    if (s.layer) clamp_all(*s.layer, y, values[s.y].size());
  }
}

constexpr int64_t lanes = LANES;

std::unique_ptr<Runner> plan_for(const Network& network, int64_t images, bool channels_last) {
  return Planner(network, images, channels_last).plan();
}

}  // namespace
