/* burn N: a fixed amount of work, N million steps; prints a checksum of it. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv) {
  uint64_t x = 88172645463325252ull;
  long millions = argc > 1 ? atol(argv[1]) : 100;
  for (long i = 0; i < millions * 1000000; i++) {
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
  }
  printf("%016llx\n", (unsigned long long)x);
  return 0;
}
