// A runtime for sparse networks: reads a .spnet file and runs it on a CPU. C interface; one C++17 source, spnet.cpp.
//
//   spnet *network;
//   if (spnet_open("model.spnet", &network) != SPNET_OK) puts(spnet_error());
//   spnet_run_bytes(network, image, 1, logits);  // (H, W, C) bytes, as decoders of image files give them
//   spnet_close(network);
//
// Networks do not share anything, and a network runs one call at a time: use one for each thread of your own.

#ifndef SPNET_H
#define SPNET_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SPNET_FORMAT 1  // the newest version of the format that is read

enum {
  SPNET_OK = 0,
  SPNET_NO_FILE = 1,    // it cannot be opened or read
  SPNET_DAMAGED = 2,    // not such a file, cut, or altered
  SPNET_NEWER = 3,      // of a version of the format that is not known here
  SPNET_ARGUMENT = 4,   // what a function was given makes no sense
  SPNET_NO_MEMORY = 5,
};

typedef struct spnet spnet;

// Reads a network from a file, or from `size` bytes in memory, which are not needed afterwards.
int spnet_open(const char *path, spnet **network);
int spnet_read(const void *bytes, size_t size, spnet **network);
void spnet_close(spnet *network);

// Why the last call of this thread failed, in one line.
const char *spnet_error(void);

// Channels, height and width of an image; how many numbers come out for each.
void spnet_shape(const spnet *network, int64_t shape[3]);
int64_t spnet_outputs(const spnet *network);

// The name of an output, mostly a class, or "" if it has none; and what else the file says of itself, as JSON.
const char *spnet_name(const spnet *network, int64_t output);
const char *spnet_metadata(const spnet *network);

// Maps images to outputs (count, outputs). `run` takes floats as the network was trained on (normalised), (count, C, H,
// W), or (count, H, W, C) if `channels_last`; `run_bytes` takes bytes as they come from files, (count, H, W, C), and
// normalises them.
int spnet_run(spnet *network, const float *images, int64_t count, int channels_last, float *outputs);
int spnet_run_bytes(spnet *network, const uint8_t *images, int64_t count, float *outputs);

// Which vectors are used: "avx512", "avx2" or "plain", what the compiler was told of. On x86 the widest that the CPU has,
// or the kind that the environment variable SPNET_INSTRUCTIONS names, unless the compiler was told of one (-march).
const char *spnet_instructions(void);

// How many threads the calls that follow use, in all networks; 1 unless it is set.
void spnet_threads(int count);

#ifdef __cplusplus
}
#endif
#endif
