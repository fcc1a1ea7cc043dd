/* unsteady N: ends with exit code 75 (try again) on the first N attempts, then works.
   unsteady bad: ends with exit code 65 (the input is wrong), whatever the attempt. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(int argc, char **argv) {
  const char *text = getenv("BACALHAU_ATTEMPT");
  int attempt = text ? atoi(text) : 0;
  if (argc != 2) return 64;
  if (!strcmp(argv[1], "bad")) {
    fprintf(stderr, "the input is wrong: trying again cannot help\n");
    return 65;
  }
  if (attempt < atoi(argv[1])) {
    fprintf(stderr, "attempt %d: the source does not answer yet\n", attempt + 1);
    return 75;
  }
  printf("attempt %d: done\n", attempt + 1);
  return 0;
}
