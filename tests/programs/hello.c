/* Arguments, environment, both output streams, exit codes.
   hello [WORD...] | --tick N | --exit N */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

extern char **environ;

int main(int argc, char **argv) {
  printf("hello");
  for (int i = 1; i < argc; i++) printf(" %s", argv[i]);
  printf("\n");
  for (char **e = environ; *e; e++) printf("env %s\n", *e);
  fflush(stdout);
  if (argc > 2 && !strcmp(argv[1], "--tick"))
    for (int i = 0; i < atoi(argv[2]); i++) {
      printf("tick %d\n", i);
      fflush(stdout);
      usleep(50000);
    }
  if (argc > 2 && !strcmp(argv[1], "--exit")) return atoi(argv[2]);
  fprintf(stderr, "to stderr\n");
  return 0;
}
