// Runs sparse networks on CPUs, with nothing but the C++17 standard library; see spnet.h for the interface and file.py
// for the format.
//
// A file is read and checked once: sizes, sums, versions, and that every layer fits what it is given. For each number of
// images a plan is made: in which grid the images of each layer lie in the lanes (convolve.h), the lists of non-zeros
// for tiles of that size, and where in one block of memory each value lives. A call then runs through the steps.

#ifdef SPNET_VECTORS  // this file includes itself, once for each kind of vectors

#include "convolve.h"
#include "plan.h"

#else

#include "spnet.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <list>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace {

// While there is one, work stays on this thread: to wake others would take longer
struct SingleThread {
  static bool& wanted() {
    static thread_local bool own = false;
    return own;
  }
  explicit SingleThread(bool on) { wanted() = on; }
  ~SingleThread() { wanted() = false; }
};

}  // namespace

#ifdef SPNET_TORCH  // inside of PyTorch: its threads
#include <ATen/Parallel.h>

constexpr int64_t PAYS = 1 << 13;  // multiply-adds of vectors from which threads pay
static int64_t thread_count() { return SingleThread::wanted() ? 1 : at::get_num_threads(); }

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

constexpr int64_t PAYS = 1 << 18;  // multiply-adds of vectors from which threads pay
static int64_t thread_count() { return SingleThread::wanted() ? 1 : pool.size(); }

template <class F>
static void on_threads(int64_t n, F f) {
  pool.run(n, f);
}
#endif

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

enum Kind { CONVOLUTION, LINEAR, AFFINE, ADD, CLAMP, MAX_POOL, MEAN_POOL, MEAN, UNIT, KINDS };
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

// -- vectors ------------------------------------------------------------------------------------------------------

struct Runner {  // a network's plan for so many images
  virtual ~Runner() = default;
  virtual void run(const float* floats, const uint8_t* bytes, float* outputs) = 0;
};

}  // namespace

#define SPNET_VECTORS
#if defined(__x86_64__) && !defined(__AVX__) && !defined(SPNET_TORCH)
#define SPNET_CHOICE  // by what the CPU has; a compiler that was told of more than SSE2 has chosen

#ifdef __clang__
#define SPNET_FOR(instructions) SPNET_PRAGMA(clang attribute push(__attribute__((target(instructions))), apply_to = function))
#define SPNET_END _Pragma("clang attribute pop")
#else
#define SPNET_FOR(instructions) _Pragma("GCC push_options") SPNET_PRAGMA(GCC target(instructions))
#define SPNET_END _Pragma("GCC pop_options")
#endif
#define SPNET_PRAGMA(text) _Pragma(#text)

#define LANES 16
#define ROWS 4
SPNET_FOR("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace avx512 {
#include "spnet.cpp"
}
SPNET_END
#undef LANES
#undef ROWS

#define LANES 8
#define ROWS 2
SPNET_FOR("avx2,fma")
namespace avx2 {
#include "spnet.cpp"
}
SPNET_END
#undef LANES
#undef ROWS
#endif

namespace plain {  // whatever the compiler was told of
#include "spnet.cpp"
}

namespace {

struct Vectors {
  const char* name;
  std::unique_ptr<Runner> (*plan_for)(const Network&, int64_t, bool);
  int64_t lanes;
};

// The widest that this CPU has, or the kind that the environment names
const Vectors& vectors() {
  static const Vectors found = [] {
#ifdef SPNET_CHOICE
    const char* wanted = std::getenv("SPNET_INSTRUCTIONS");
    auto wants = [&](const char* name) { return !wanted || !*wanted || !std::strcmp(wanted, name); };
    bool half = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (half && wide && wants("avx512")) return Vectors{"avx512", avx512::plan_for, avx512::lanes};
    if (half && wants("avx2")) return Vectors{"avx2", avx2::plan_for, avx2::lanes};
#endif
    return Vectors{"plain", plain::plan_for, plain::lanes};
  }();
  return found;
}

}  // namespace

struct spnet {
  std::unique_ptr<Network> network;
  std::list<std::pair<std::pair<int64_t, bool>, std::unique_ptr<Runner>>> plans;  // of the last few sizes, newest first

  Runner& plan(int64_t images, bool channels_last) {
    auto wanted = std::make_pair(images, channels_last);
    for (auto it = plans.begin(); it != plans.end(); ++it)
      if (it->first == wanted) {
        plans.splice(plans.begin(), plans, it);
        return *it->second;
      }
    plans.emplace_front(wanted, vectors().plan_for(*network, images, channels_last));
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
    // As many images at a time as fill the lanes of all threads, so that what a layer makes is still near when the next
    // one reads it; images that fill no vector by themselves
    int64_t lanes = vectors().lanes, most = lanes * thread_count(), whole = count / lanes * lanes;
    int64_t in = n->network->shapes.front().size(), out = n->network->shapes.back().size();
    for (int64_t at = 0, size; at < count; at += size) {
      size = at < whole ? std::min(most, whole - at) : count - whole;
      n->plan(size, last).run(floats ? floats + at * in : nullptr, bytes ? bytes + at * in : nullptr, outputs + at * out);
    }
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

const char* spnet_instructions(void) { return vectors().name; }

void spnet_threads(int count) {
#ifdef SPNET_TORCH
  (void)count;  // torch's
#else
  pool.resize(std::max(count, 1));
#endif
}
}

#endif  // SPNET_VECTORS
