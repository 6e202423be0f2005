// Runs sparse networks on CPUs, with nothing but the C++17 standard library; see spnet.h for the interface and file.py
// for the format.
//
// A file is read and checked once: sizes, sums, versions, and that every layer fits what it is given. For each number of
// images a plan is made: in which grid the images of each layer lie in the lanes (convolve.h), the lists of non-zeros
// for tiles of that size, and where in one block of memory each value lives. A call then runs through the steps.

#include "spnet.h"

#include <array>
#include <cstdio>
#include <limits>
#include <list>
#include <map>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#ifdef SPNET_TORCH  // inside of PyTorch: its threads
#include <ATen/Parallel.h>

static int64_t thread_count() { return at::get_num_threads(); }

template <class F>
static void on_threads(int64_t n, F f) {
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) f(i);
  });
}
#else
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace {

// Threads that wait for work; the caller is one of them
class Pool {
 public:
  ~Pool() { resize(1); }
  int64_t size() const { return 1 + (int64_t)workers.size(); }
  void resize(int64_t count) {
    std::lock_guard<std::mutex> one_at_a_time(calls);
    {
      std::lock_guard<std::mutex> hold(lock);
      stop = true;
    }
    wake.notify_all();
    for (auto& worker : workers) worker.join();
    workers.clear();
    stop = false;
    for (int64_t i = 1; i < count; i++) workers.emplace_back([this, i, from = round] { work(i, from); });
  }
  void run(int64_t n, const std::function<void(int64_t)>& f) {
    std::lock_guard<std::mutex> one_at_a_time(calls);
    {
      std::lock_guard<std::mutex> hold(lock);
      task = &f, tasks = n, left = (int64_t)workers.size(), round++;
    }
    wake.notify_all();
    for (int64_t i = 0; i < n; i += size()) f(i);
    std::unique_lock<std::mutex> hold(lock);
    done.wait(hold, [this] { return left == 0; });
  }

 private:
  void work(int64_t own, uint64_t seen) {
    for (;;) {
      std::unique_lock<std::mutex> hold(lock);
      wake.wait(hold, [&] { return stop || round != seen; });
      if (stop) return;
      seen = round;
      hold.unlock();
      for (int64_t i = own; i < tasks; i += size()) (*task)(i);
      hold.lock();
      if (--left == 0) done.notify_one();
    }
  }
  std::vector<std::thread> workers;
  std::mutex calls, lock;
  std::condition_variable wake, done;
  const std::function<void(int64_t)>* task = nullptr;
  int64_t tasks = 0, left = 0;
  uint64_t round = 0;
  bool stop = false;
};

Pool pool;

}  // namespace

static int64_t thread_count() { return pool.size(); }

template <class F>
static void on_threads(int64_t n, F f) {
  pool.run(n, f);
}
#endif

#include "convolve.h"

namespace {

struct Failure : std::runtime_error {
  int code;
  Failure(int code, const std::string& text) : std::runtime_error(text), code(code) {}
};

void check(bool right, const char* what) {
  if (!right) throw Failure(SPNET_DAMAGED, std::string("the file is damaged: ") + what);
}

std::string& last_error() {
  static thread_local std::string text;
  return text;
}

// -- the file -----------------------------------------------------------------------------------------------------

enum Kind { CONVOLUTION, LINEAR, AFFINE, ADD, CLAMP, MAX_POOL, MEAN_POOL, MEAN, KINDS };
enum Type { FLOAT32, BFLOAT16, INT8, TYPES };

constexpr int64_t MOST = int64_t(1) << 28;  // numbers in a value for one image, and in a weight

// One layer. Value 0 is the network's input; layer i reads `input` and `other` and makes value i + 1
struct Layer {
  int32_t kind, input, other, kernel, stride, padding, dilation, groups, in, out, type, rectified;
  float low, high;       // what comes out is clamped to, after `other` was added
  uint64_t mask, count;  // of the weight: where in the file the bits are, and how many of them are set
  uint64_t values, rest;  // its values in the order of the bits; a number or two for each output channel
};

struct Shape {
  int64_t channels, height, width;
  int64_t pixels() const { return height * width; }
  int64_t size() const { return channels * pixels(); }
};

struct Network {
  std::vector<uint8_t> bytes;
  std::string metadata, names;  // names end with a zero each
  std::vector<size_t> name_at;
  std::vector<Layer> layers;
  std::vector<Shape> shapes;       // of values
  std::vector<float> scale, shift;  // of bytes, by channel

  const float* floats(uint64_t at) const { return (const float*)(bytes.data() + at); }
  int64_t taps(const Layer& l) const { return l.kind == LINEAR ? 1 : (int64_t)l.kernel * l.kernel; }
  int64_t inputs(const Layer& l) const { return l.kind == LINEAR ? shapes[l.input].size() : l.in / l.groups; }

  // Calls f(output channel, input channel of its group, tap, value) for the non-zeros
  template <class F>
  void each(const Layer& l, F f) const {
    int64_t inputs = this->inputs(l), taps = this->taps(l), n = 0, bit = 0;
    const uint8_t *mask = bytes.data() + l.mask, *values = bytes.data() + l.values;
    const float* scales = floats(l.rest) + l.out;
    for (int64_t o = 0; o < l.out; o++)
      for (int64_t c = 0; c < inputs; c++)
        for (int64_t t = 0; t < taps; t++, bit++)
          if (mask[bit / 8] >> bit % 8 & 1) {
            float value;
            if (l.type == FLOAT32) {
              std::memcpy(&value, values + 4 * n, 4);
            } else if (l.type == BFLOAT16) {
              uint16_t half;
              std::memcpy(&half, values + 2 * n, 2);
              uint32_t whole = (uint32_t)half << 16;
              std::memcpy(&value, &whole, 4);
            } else {
              value = (int8_t)values[n] * scales[o];
            }
            f(o, c, t, value);
            n++;
          }
  }
};

uint32_t checksum(const uint8_t* bytes, size_t size) {  // CRC-32, as zlib's
  static const auto table = [] {
    std::array<uint32_t, 256> made{};
    for (uint32_t i = 0; i < 256; i++) {
      made[i] = i;
      for (int k = 0; k < 8; k++) made[i] = made[i] & 1 ? made[i] >> 1 ^ 0xedb88320u : made[i] >> 1;
    }
    return made;
  }();
  uint32_t sum = ~0u;
  for (size_t i = 0; i < size; i++) sum = table[(sum ^ bytes[i]) & 255] ^ sum >> 8;
  return ~sum;
}

struct Header {
  char magic[8];
  uint64_t version, size, sum;  // bytes of the file; of all that follows
  uint32_t channels, height, width, layers, metadata, normalised, names, zero;
};

int64_t size_after(int64_t size, const Layer& l) {
  return (size + 2 * (int64_t)l.padding - (int64_t)l.dilation * (l.kernel - 1) - 1) / l.stride + 1;
}

Shape shape_after(const Network& n, const Layer& l) {
  Shape in = n.shapes[l.input];
  switch (l.kind) {
    case CONVOLUTION: return {l.out, size_after(in.height, l), size_after(in.width, l)};
    case MAX_POOL:
    case MEAN_POOL: return {in.channels, size_after(in.height, l), size_after(in.width, l)};
    case LINEAR: return {l.out, 1, 1};
    case MEAN: return {in.channels, 1, 1};
    default: return in;
  }
}

void check_layer(const Network& n, const Layer& l, int64_t at) {
  auto inside = [&](uint64_t from, uint64_t size) {
    return from % 4 == 0 && from <= n.bytes.size() && size <= n.bytes.size() - from;
  };
  check(l.kind >= 0 && l.kind < KINDS && l.type >= 0 && l.type < TYPES, "a layer of a kind that there is not");
  check(l.input >= 0 && l.input <= at && l.other >= -1 && l.other <= at, "a layer reads what is not there");
  bool window = l.kind == CONVOLUTION || l.kind == MAX_POOL || l.kind == MEAN_POOL;
  Shape in = n.shapes[l.input];
  check(l.in == (l.kind == LINEAR ? in.size() : in.channels), "a layer gets other channels than it has");
  check(l.out >= 1 && l.out <= 1 << 20, "a layer without channels");
  if (window) {
    check(l.kernel >= 1 && l.kernel <= 31 && l.stride >= 1 && l.stride <= 31, "a window of a size that there is not");
    check(l.dilation >= 1 && l.dilation <= 31 && l.padding >= 0 && l.padding <= l.dilation * (l.kernel - 1), "padding");
    check(l.kind == CONVOLUTION || 2 * l.padding <= l.kernel, "padding");
    int64_t reach = (int64_t)l.dilation * (l.kernel - 1) + 1;
    check(std::min(in.height, in.width) + 2 * l.padding >= reach, "a window larger than the image");
    check(l.groups >= 1 && l.in % l.groups == 0 && l.out % l.groups == 0, "groups that do not divide the channels");
  }
  Shape out = shape_after(n, l);
  check(l.kind == CONVOLUTION || l.kind == LINEAR || l.out == in.channels, "a layer that changes its channels");
  check(out.size() <= MOST, "a value that is too large");
  if (l.kind == ADD) check(l.other >= 0, "a sum of one value");
  if (l.other >= 0) {
    Shape other = n.shapes[l.other];
    check(l.kind == CONVOLUTION || l.kind == ADD, "a layer of two values");
    check(other.channels == out.channels && other.height == out.height && other.width == out.width,
          "a sum of values of different sizes");
  }
  if (l.kind == AFFINE) check(inside(l.rest, 8 * (uint64_t)l.out), "a layer's numbers are not there");
  if (l.kind != CONVOLUTION && l.kind != LINEAR) return;
  uint64_t weights = (uint64_t)n.inputs(l) * n.taps(l);
  check(weights <= (uint64_t)MOST / l.out, "a weight that is too large");
  weights *= l.out;
  static const uint64_t sizes[] = {4, 2, 1};
  check(inside(l.mask, (weights + 7) / 8) && l.count <= weights && inside(l.values, l.count * sizes[l.type]) &&
            inside(l.rest, (l.type == INT8 ? 8 : 4) * (uint64_t)l.out), "a layer's weights are not there");
  uint64_t set = 0;
  for (uint64_t i = 0; i < weights; i++) set += n.bytes[l.mask + i / 8] >> i % 8 & 1;
  check(set == l.count, "other weights are alive than there are values");
}

std::unique_ptr<Network> read(const void* bytes, size_t size) {
  auto n = std::make_unique<Network>();
  n->bytes.assign((const uint8_t*)bytes, (const uint8_t*)bytes + size);
  Header h;
  check(size >= sizeof h, "it is too short");
  std::memcpy(&h, bytes, sizeof h);
  check(!std::memcmp(h.magic, "SPNET\r\n", 8), "it is no .spnet file");
  if (h.version > SPNET_FORMAT)
    throw Failure(SPNET_NEWER, "the file is of version " + std::to_string(h.version) +
                                   " of the format, and this runtime reads up to " + std::to_string(SPNET_FORMAT));
  check(h.version >= 1, "there is no such version");
  check(h.size == size && size % 8 == 0, "it is cut, or too long");
  check(checksum(n->bytes.data() + 32, size - 32) == h.sum, "its checksum is another");
  check(h.channels && h.channels <= 1 << 20 && h.height && h.height <= 1 << 16 && h.width && h.width <= 1 << 16, "size");
  check((uint64_t)h.height * h.width <= (uint64_t)MOST / h.channels, "images that are too large");
  check(h.layers >= 1 && h.layers <= 1 << 16, "it has no layers");
  uint64_t at = sizeof h, normalisation = h.normalised ? 8 * (uint64_t)h.channels : 0;
  uint64_t needed = at + normalisation + h.layers * sizeof(Layer) + h.metadata + h.names;
  check(needed <= size, "it is too short for its layers");
  n->scale.assign(h.channels, 1.f / 255), n->shift.assign(h.channels, 0);
  if (h.normalised) {
    std::memcpy(n->scale.data(), n->bytes.data() + at, 4 * h.channels);
    std::memcpy(n->shift.data(), n->bytes.data() + at + 4 * h.channels, 4 * h.channels);
  }
  at += normalisation;
  n->layers.resize(h.layers);
  std::memcpy(n->layers.data(), n->bytes.data() + at, h.layers * sizeof(Layer));
  at += h.layers * sizeof(Layer);
  n->metadata.assign((const char*)n->bytes.data() + at, h.metadata);
  n->names.assign((const char*)n->bytes.data() + at + h.metadata, h.names);
  check(n->names.empty() || n->names.back() == 0, "its names have no end");
  for (size_t i = 0; i < n->names.size(); i = n->names.find('\0', i) + 1) n->name_at.push_back(i);
  n->shapes.push_back({h.channels, h.height, h.width});
  for (int64_t i = 0; i < h.layers; i++) {
    check_layer(*n, n->layers[i], i);
    n->shapes.push_back(shape_after(*n, n->layers[i]));
  }
  return n;
}

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
  int64_t groups, place, first, last;  // place in memory, in floats; steps that write it first and read it last
  int64_t height() const { return shape.height / parts.rows; }
  int64_t width() const { return shape.width / parts.columns; }
  int64_t plane() const { return height() * width() * LANES; }
  int64_t size() const { return groups * shape.channels * plane(); }
  // Of a pixel of the first channel
  int64_t at(int64_t image, int64_t row, int64_t column) const {
    int64_t part = row / height() * parts.columns + column / width();
    int64_t lane = image % parts.each() * parts.rows * parts.columns + part;
    int64_t pixel = row % height() * width() + column % width();
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

enum Act { TAKE, GIVE, REGRID, SPARSE, WINDOWED, DOT, COMBINE, POOL, AVERAGE };

struct Step {
  Act act;
  const Layer* layer;
  int64_t x, other, y;  // numbers of blocked values; -1 where there is none
  Moves moves;
  int64_t mode;
  std::unique_ptr<Convolution> about;
  std::unique_ptr<Grid> grid;
  std::vector<int32_t> ptr, place;
  std::vector<uint16_t> offset;
  std::vector<float> value;
};

struct Plan {
  int64_t images;
  std::vector<Blocked> values;
  std::vector<Step> steps;
  std::vector<float> memory;
  float* at(int64_t value) {
    float* begin = (float*)(((uintptr_t)memory.data() + 63) / 64 * 64);
    return begin + values[value].place;
  }
};

bool is_windowed(const Layer& l) { return l.kind == CONVOLUTION || l.kind == MAX_POOL || l.kind == MEAN_POOL; }

// Up to whole pairs of vectors
int64_t rounded(int64_t size) { return (size + 2 * LANES - 1) / (2 * LANES) * 2 * LANES; }

// Whether parts of an image stay parts of it, if the stride divides them
bool keeps_parts(const Layer& l) {
  if (!is_windowed(l)) return l.kind != LINEAR;
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
    made = std::make_unique<Plan>();
    made->images = images;
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
    made->values.push_back({shape, parts, parts.groups(images), 0, -1, -1});
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
    Shape s = network.shapes[v];
    int64_t b = value(s, parts);
    Step move = step(v == 0 ? TAKE : REGRID, nullptr, v == 0 ? -1 : found[v].front());
    move.y = b;
    const Blocked& to = made->values[b];
    if (v == 0) {
      int64_t pixel = channels_last ? s.channels : 1;
      move.moves = moves(s, channels_last ? 1 : s.pixels(), to.plane(), [&](int64_t i, int64_t row, int64_t column) {
        return std::make_pair(i * s.size() + (row * s.width + column) * pixel, to.at(i, row, column));
      });
    } else {
      const Blocked& from = made->values[move.x];
      move.moves = moves(s, from.plane(), to.plane(), [&](int64_t i, int64_t row, int64_t column) {
        return std::make_pair(from.at(i, row, column), to.at(i, row, column));
      });
    }
    made->steps.push_back(std::move(move));
    found[v].push_back(b);
    return b;
  }

  void add(const Layer& l, int64_t made_value) {
    Shape s = network.shapes[l.input], after = network.shapes[made_value];
    Parts parts = found[l.input].empty() ? parts_for(l, s, images) : made->values[found[l.input].front()].parts;
    if (!fits(l, s, parts)) parts = parts_for(l, s, images);
    if (l.kind == LINEAR) parts = {1, 1};
    int64_t x = in(l.input, parts);
    Parts out = l.kind == LINEAR || l.kind == MEAN ? Parts{1, 1} : parts;
    int64_t other = l.other < 0 ? -1 : in(l.other, out);
    static const Act acts[] = {SPARSE, SPARSE, COMBINE, COMBINE, COMBINE, POOL, POOL, AVERAGE};
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
    made->steps.push_back(std::move(own));
    found[made_value].push_back(made->steps.back().y);
  }

  // Input channels packed at once, so that their windows fill the first cache
  static int64_t block(int64_t mode, int64_t side, bool dense) {
    static const int64_t sizes[4][3] = {{64, 32, 32}, {64, 40, 0}, {48, 28, 0}, {48, 18, 8}};  // FLAT, NEXT, AROUND, STRIDED
    int64_t found = sizes[mode][std::min<int64_t>(side, 3) - 1];
    return found ? found : dense ? 16 : 24;
  }

  void list(Step& s) {
    const Layer& l = *s.layer;
    Blocked x = made->values[s.x], y = made->values[s.y];
    bool linear = l.kind == LINEAR;
    int64_t kernel = linear ? 1 : l.kernel, stride = linear ? 1 : l.stride, padding = linear ? 0 : l.padding;
    int64_t inputs = linear ? x.shape.size() : l.in, taps = kernel * kernel;
    s.mode = kernel == 1 ? FLAT : stride == 1 ? AROUND : STRIDED;
    int64_t side = std::min<int64_t>(3, std::max(y.height(), y.width()));
    int64_t whole = std::max<int64_t>(1, l.out * inputs * taps);
    int64_t own = std::min(block(s.mode, side, (double)l.count > 0.07 * whole), inputs);
    int64_t h = linear ? 1 : x.height(), w = linear ? 1 : x.width();
    s.about.reset(new Convolution{x.groups, inputs, l.out, h, w, y.height(), y.width(), y.height(), y.width(), l.out,
                                  -padding, -padding, kernel == 1 ? stride : 1, 1, own, *s.grid});
    int64_t parts = parts_of(s.mode), blocks = (inputs + own - 1) / own, lists = blocks * l.out * parts;
    auto list_of = [&](int64_t o, int64_t c, int64_t t) { return (c / own * l.out + o) * parts + t % parts; };
    s.ptr.assign(lists + 1, 0);
    network.each(l, [&](int64_t o, int64_t c, int64_t t, float) { s.ptr[list_of(o, c, t) + 1]++; });
    for (int64_t i = 0; i < lists; i++) s.ptr[i + 1] += s.ptr[i];
    std::vector<int32_t> next(s.ptr.begin(), s.ptr.end());
    s.offset.resize(l.count), s.value.resize(l.count);
    int64_t apart = s.mode == STRIDED ? 2 : 1, more = s.mode == FLAT ? 0 : 2;
    int64_t high = ((side > 2 ? ROWS : side) - 1) * apart + 1 + more, wide = ((side > 2 ? COLUMNS : side) - 1) * apart + 1 + more;
    network.each(l, [&](int64_t o, int64_t c, int64_t t, float value) {
      int32_t e = next[list_of(o, c, t)]++;
      s.offset[e] = (uint16_t)((c % own * high + t / kernel) * wide + t % kernel);
      s.value[e] = value;
    });
  }

  void list_windowed(Step& s) {
    const Layer& l = *s.layer;
    Blocked x = made->values[s.x];
    int64_t high = x.height() + 2 * l.padding, wide = x.width() + 2 * l.padding;
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
      if (!a && !b) *(vec*)out = *(const vec*)(x + (i * w + j) * LANES);
      else if (!cut) *(vec*)out = empty;
      else *(vec*)out = pick(*(const vec*)(x + ((i - a * h) * w + j - b * w) * LANES), empty, grid.shift[a + 1][b + 1]);
    }
}

void run_windowed(const Network& n, const Step& s, const Blocked& x, const Blocked& y, const float* from,
                  const float* add, float* to) {
  const Layer& l = *s.layer;
  int64_t h = x.height() + 2 * l.padding, w = x.width() + 2 * l.padding, ins = l.in / l.groups, outs = l.out / l.groups;
  const float* bias = n.floats(l.rest);
  int64_t splits = l.groups == 1 ? std::min<int64_t>(thread_count(), outs) : 1;
  share(x.groups * l.groups * splits, [&](int64_t begin, int64_t end) {
    float* planes = scratch(ins * h * w * LANES, 0);
    for (int64_t item = begin; item < end; item++) {
      int64_t split = item % splits, part = item / splits % l.groups, group = item / splits / l.groups;
      for (int64_t c = 0; c < ins; c++)
        surround(*s.grid, from + (group * l.in + part * ins + c) * x.plane(), x.height(), x.width(), l.padding, 0,
                 planes + c * h * w * LANES);
      for (int64_t o = part * outs + outs * split / splits; o < part * outs + outs * (split + 1) / splits; o++)
        for (int64_t i = 0; i < y.height(); i++)
          for (int64_t j = 0; j < y.width(); j += COLUMNS) {
            int64_t some = std::min<int64_t>(COLUMNS, y.width() - j), apart = l.stride * LANES;
            const float* seen = planes + (i * l.stride * w + j * l.stride) * LANES;
            vec a[COLUMNS];
            for (int u = 0; u < COLUMNS; u++) a[u] = bias[o] - (vec){};
            if (some == COLUMNS) {
              for (int32_t e = s.ptr[o]; e < s.ptr[o + 1]; e++)
                for (int u = 0; u < COLUMNS; u++)
                  a[u] += s.value[e] * *(const vec*)(seen + (int64_t)s.place[e] * LANES + u * apart);
            } else {
              for (int32_t e = s.ptr[o]; e < s.ptr[o + 1]; e++)
                for (int64_t u = 0; u < some; u++)
                  a[u] += s.value[e] * *(const vec*)(seen + (int64_t)s.place[e] * LANES + u * apart);
            }
            int64_t at = (group * l.out + o) * y.plane() + (i * y.width() + j) * LANES;
            for (int64_t u = 0; u < some; u++) {
              vec v = add ? a[u] + *(const vec*)(add + at + u * LANES) : a[u];
              *(vec*)(to + at + u * LANES) = l.rectified ? rectified(v) : v;
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
        all[0] += *(const vec*)(weight + i) * *(const vec*)(own + i);
        all[1] += *(const vec*)(weight + i + LANES) * *(const vec*)(own + i + LANES);
      }
      vec both = all[0] + all[1];
      float found = sum((const float*)&both) + bias[o];
      to[image / LANES * l.out * LANES + o * LANES + image % LANES] = l.rectified && !(found >= 0) && found == found ? 0 : found;
    }
  }
}

void run_pool(const Step& s, const Blocked& x, const Blocked& y, const float* from, float* to) {
  const Layer& l = *s.layer;
  bool max = l.kind == MAX_POOL;
  int64_t w = x.width() + 2 * l.padding, h = x.height() + 2 * l.padding;
  float each = 1.f / ((float)l.kernel * l.kernel);
  share(x.groups * l.in, [&](int64_t begin, int64_t end) {
    float* plane = l.padding ? scratch(h * w * LANES, 0) : nullptr;
    for (int64_t c = begin; c < end; c++) {
      const float* seen = from + c * x.plane();
      if (plane) {
        float fill = max ? -std::numeric_limits<float>::infinity() : 0;
        surround(*s.grid, seen, x.height(), x.width(), l.padding, fill, plane);
        seen = plane;
      }
      for (int64_t i = 0; i < y.height(); i++)
        for (int64_t j = 0; j < y.width(); j++) {
          const float* at = seen + (i * l.stride * w + j * l.stride) * LANES;
          vec v = *(const vec*)at;
          for (int64_t t = 1; t < (int64_t)l.kernel * l.kernel; t++) {
            vec u = *(const vec*)(at + (t / l.kernel * w + t % l.kernel) * LANES);
            ivec less = (ivec)~(u <= v) & (ivec) ~((ivec)(v != v));  // NaN stays
            v = max ? (vec)((less & (ivec)u) | (~less & (ivec)v)) : v + u;
          }
          *(vec*)(to + c * y.plane() + (i * y.width() + j) * LANES) = max ? v : v * each;
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
        for (int64_t i = 0; i < x.plane(); i += LANES) sum += *(const vec*)(at + i);
        for (int64_t i = 0; i < each && g * each + i < images; i++) {
          float all = 0;
          for (int64_t p = 0; p < cut; p++) all += sum[i * cut + p];
          int64_t image = g * each + i;
          to[(image / LANES * channels + c) * LANES + image % LANES] = all / x.shape.pixels();
        }
      }
  });
}

void run_combine(const Network& n, const Step& s, const Blocked& x, const float* from, const float* add, float* to) {
  const Layer& l = *s.layer;
  const float* numbers = l.kind == AFFINE ? n.floats(l.rest) : nullptr;
  share(x.groups * l.out, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c++) {
      float scale = numbers ? numbers[c % l.out] : 1, shift = numbers ? numbers[l.out + c % l.out] : 0;
      for (int64_t i = c * x.plane(); i < (c + 1) * x.plane(); i += LANES) {
        vec v = *(const vec*)(from + i);
        if (numbers) v = v * scale + shift;
        if (add) v += *(const vec*)(add + i);
        *(vec*)(to + i) = l.rectified ? rectified(v) : v;
      }
    }
  });
}

void clamp_all(const Layer& l, float* y, int64_t size) {
  if (!(l.low > -std::numeric_limits<float>::infinity()) && !(l.high < std::numeric_limits<float>::infinity())) return;
  for (int64_t i = 0; i < size; i += LANES) *(vec*)(y + i) = clamped(*(const vec*)(y + i), l.low, l.high);
}

void run(const Network& n, Plan& p, const float* floats, const uint8_t* bytes, float* outputs) {
  auto same = [](float v, int64_t) { return v; };
  for (const Step& s : p.steps) {
    const float* x = s.x < 0 ? nullptr : p.at(s.x);
    const float* add = s.other < 0 ? nullptr : p.at(s.other);
    float* y = s.y < 0 ? nullptr : p.at(s.y);
    switch (s.act) {
      case TAKE:
        if (floats) s.moves.run(n.shapes[0].channels, floats, y, same);
        else s.moves.run(n.shapes[0].channels, bytes, y, [&](uint8_t v, int64_t c) { return v * n.scale[c] + n.shift[c]; });
        break;
      case REGRID: s.moves.run(p.values[s.y].shape.channels, x, y, same); break;
      case SPARSE:
        convolve(s.mode, *s.about, x, s.ptr.data(), s.offset.data(), s.value.data(), n.floats(s.layer->rest), add,
                 s.layer->rectified, y);
        break;
      case WINDOWED: run_windowed(n, s, p.values[s.x], p.values[s.y], x, add, y); break;
      case DOT: run_dot(n, s, p.values[s.x], p.images, x, y); break;
      case COMBINE: run_combine(n, s, p.values[s.x], x, add, y); break;
      case POOL: run_pool(s, p.values[s.x], p.values[s.y], x, y); break;
      case AVERAGE: run_mean(p.values[s.x], p.values[s.y], p.images, x, y); break;
      case GIVE: s.moves.run(n.shapes.back().channels, x, outputs, same);
    }
    if (s.layer) clamp_all(*s.layer, y, p.values[s.y].size());
  }
}

}  // namespace

struct spnet {
  std::unique_ptr<Network> network;
  std::list<std::pair<std::pair<int64_t, bool>, std::unique_ptr<Plan>>> plans;  // of the last few sizes, newest first

  Plan& plan(int64_t images, bool channels_last) {
    auto wanted = std::make_pair(images, channels_last);
    for (auto it = plans.begin(); it != plans.end(); ++it)
      if (it->first == wanted) {
        plans.splice(plans.begin(), plans, it);
        return *it->second;
      }
    plans.emplace_front(wanted, Planner(*network, images, channels_last).plan());
    if (plans.size() > 4) plans.pop_back();
    return *plans.front().second;
  }
};

template <class F>
static int guarded(F f) {
  try {
    f();
    return SPNET_OK;
  } catch (const Failure& e) {
    last_error() = e.what();
    return e.code;
  } catch (const std::bad_alloc&) {
    last_error() = "there is not enough memory";
    return SPNET_NO_MEMORY;
  } catch (const std::exception& e) {
    last_error() = e.what();
    return SPNET_DAMAGED;
  }
}

static int run_checked(spnet* n, const float* floats, const uint8_t* bytes, int64_t count, bool last, float* outputs) {
  return guarded([&] {
    if (!n || (!floats && !bytes) || !outputs) throw Failure(SPNET_ARGUMENT, "a pointer is null");
    if (count < 1 || count > 1 << 20)
      throw Failure(SPNET_ARGUMENT, "count is " + std::to_string(count) + "; images are 1 to 1048576 at a time");
    run(*n->network, n->plan(count, last), floats, bytes, outputs);
  });
}

extern "C" {

int spnet_read(const void* bytes, size_t size, spnet** network) {
  return guarded([&] {
    if (!bytes || !network) throw Failure(SPNET_ARGUMENT, "a pointer is null");
    *network = nullptr;
    auto made = std::make_unique<spnet>();
    made->network = read(bytes, size);
    *network = made.release();
  });
}

int spnet_open(const char* path, spnet** network) {
  std::vector<uint8_t> bytes;
  int code = guarded([&] {
    if (!path || !network) throw Failure(SPNET_ARGUMENT, "a pointer is null");
    *network = nullptr;
    std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(path, "rb"), std::fclose);
    if (!file) throw Failure(SPNET_NO_FILE, std::string(path) + ": it cannot be opened");
    uint8_t some[1 << 14];
    for (size_t n; (n = std::fread(some, 1, sizeof some, file.get())) > 0;) bytes.insert(bytes.end(), some, some + n);
    if (std::ferror(file.get())) throw Failure(SPNET_NO_FILE, std::string(path) + ": it cannot be read");
    if (bytes.empty()) throw Failure(SPNET_DAMAGED, std::string(path) + ": it is empty");
  });
  return code == SPNET_OK ? spnet_read(bytes.data(), bytes.size(), network) : code;
}

void spnet_close(spnet* network) { delete network; }

const char* spnet_error(void) { return last_error().c_str(); }

void spnet_shape(const spnet* network, int64_t shape[3]) {
  Shape s = network->network->shapes.front();
  shape[0] = s.channels, shape[1] = s.height, shape[2] = s.width;
}

int64_t spnet_outputs(const spnet* network) { return network->network->shapes.back().size(); }

const char* spnet_metadata(const spnet* network) { return network->network->metadata.c_str(); }

const char* spnet_name(const spnet* network, int64_t output) {
  const Network& n = *network->network;
  bool there = output >= 0 && output < (int64_t)n.name_at.size();
  return there ? n.names.c_str() + n.name_at[output] : "";
}

int spnet_run(spnet* network, const float* images, int64_t count, int channels_last, float* outputs) {
  return run_checked(network, images, nullptr, count, channels_last != 0, outputs);
}

int spnet_run_bytes(spnet* network, const uint8_t* images, int64_t count, float* outputs) {
  return run_checked(network, nullptr, images, count, true, outputs);
}

void spnet_threads(int count) {
#ifdef SPNET_TORCH
  (void)count;  // torch's
#else
  pool.resize(std::max(count, 1));
#endif
}
}
