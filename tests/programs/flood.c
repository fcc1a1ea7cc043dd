/* flood N [stderr]: writes N bytes in lines of 64; N 0 means without end. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(int argc, char **argv) {
  long left = argc > 1 ? atol(argv[1]) : 0;
  FILE *out = argc > 2 && !strcmp(argv[2], "stderr") ? stderr : stdout;
  char block[4096];
  memset(block, 'x', sizeof block);
  for (size_t i = 63; i < sizeof block; i += 64) block[i] = '\n';
  if (left == 0)
    for (;;) fwrite(block, 1, sizeof block, out);
  while (left > 0) {
    size_t size = left < (long)sizeof block ? (size_t)left : sizeof block;
    fwrite(block, 1, size, out);
    left -= (long)size;
  }
  return 0;
}
