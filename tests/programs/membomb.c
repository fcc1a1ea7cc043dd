/* Takes memory until there is none. "abort" (the default) then traps, "exit" ends with 9. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(int argc, char **argv) {
  for (int mib = 0;; mib++) {
    char *block = malloc(1 << 20);
    if (!block) {
      fprintf(stderr, "out of memory after %d MiB\n", mib);
      if (argc > 1 && !strcmp(argv[1], "exit")) return 9;
      abort();
    }
    memset(block, mib + 1, 1 << 20);
    volatile char *keep = block;
    (void)keep[123];
  }
}
