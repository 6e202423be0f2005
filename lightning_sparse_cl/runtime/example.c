// Says what an image shows: example MODEL.spnet IMAGE.ppm ...
//
// Images are binary PPM files (P6) of the network's size, or PGM (P5) where it takes one channel; ImageMagick makes them:
// convert photo.jpg -resize 32x32! photo.ppm

#include <stdio.h>
#include <stdlib.h>

#include "spnet.h"

// The next number of a header, after blanks and comments, or -1
static long number(FILE *file) {
  long found;
  int c;
  while ((c = fgetc(file)) == '#' || c == ' ' || c == '\n' || c == '\r' || c == '\t')
    while (c == '#' && (c = fgetc(file)) != '\n' && c != EOF) c = '#';
  if (c == EOF || ungetc(c, file) == EOF) return -1;
  return fscanf(file, "%ld", &found) == 1 ? found : -1;
}

// The bytes (H, W, C) of an image, or NULL
static uint8_t *read_image(const char *path, const int64_t shape[3]) {
  FILE *file = fopen(path, "rb");
  char kind = 0;
  long width, height, most;
  size_t size = (size_t)(shape[0] * shape[1] * shape[2]);
  uint8_t *bytes = malloc(size);
  int right = file && bytes && fscanf(file, "P%c", &kind) == 1;
  right = right && (shape[0] == 1 ? kind == '5' : shape[0] == 3 && kind == '6');
  right = right && (width = number(file)) == shape[2] && (height = number(file)) == shape[1];
  right = right && (most = number(file)) == 255 && fgetc(file) != EOF && fread(bytes, 1, size, file) == size;
  if (file) fclose(file);
  if (right) return bytes;
  fprintf(stderr, "%s: an image of %ldx%ld pixels and %ld channels is expected, as PPM or PGM\n", path, (long)shape[2],
          (long)shape[1], (long)shape[0]);
  free(bytes);
  return NULL;
}

int main(int count, char **arguments) {
  spnet *network;
  int64_t shape[3];
  if (count < 3) return fprintf(stderr, "example MODEL.spnet IMAGE.ppm ...\n"), 2;
  if (spnet_open(arguments[1], &network) != SPNET_OK) return fprintf(stderr, "%s: %s\n", arguments[1], spnet_error()), 1;
  spnet_shape(network, shape);
  int64_t outputs = spnet_outputs(network);
  float *found = malloc(sizeof(float) * (size_t)outputs);
  int failed = !found;
  for (int i = 2; i < count && found; i++) {
    uint8_t *image = read_image(arguments[i], shape);
    if (!image) {
      failed = 1;
      continue;
    }
    if (spnet_run_bytes(network, image, 1, found) != SPNET_OK) fprintf(stderr, "%s\n", spnet_error()), failed = 1;
    int64_t best = 0;
    for (int64_t o = 1; o < outputs; o++)
      if (found[o] > found[best]) best = o;
    printf("%s: %s\n", arguments[i], spnet_name(network, best));
    free(image);
  }
  free(found);
  spnet_close(network);
  return failed;
}
