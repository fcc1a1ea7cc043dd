/* trap unreachable | memory | stack | divide: ends by a trap of that kind. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int deeper(volatile int *p, int n) {
  volatile char block[256];
  if (*p) return 0; /* never, but the compiler cannot know */
  block[0] = (char)n;
  return deeper(p, n + 1) + block[0] + *p;
}

int main(int argc, char **argv) {
  const char *kind = argc > 1 ? argv[1] : "unreachable";
  volatile int zero = 0;
  printf("about to trap: %s\n", kind);
  fflush(stdout);
  if (!strcmp(kind, "memory")) return *(volatile int *)0xfffffff0u;
  if (!strcmp(kind, "stack")) return deeper(&zero, 0);
  if (!strcmp(kind, "divide")) return 12345 / zero;
  __builtin_trap();
}
