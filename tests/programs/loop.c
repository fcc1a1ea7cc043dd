/* Says so, then spins for ever without any call. */
#include <stdio.h>

int main(void) {
  puts("looping");
  fflush(stdout);
  volatile unsigned n = 0;
  for (;;) n++;
}
