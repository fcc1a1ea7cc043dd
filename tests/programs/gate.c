/* Waits at a gate: goes on once the file PATH exists, looking every 20 ms.
   gate PATH */
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

int main(int argc, char **argv) {
  struct stat found;
  printf("waiting\n");
  fflush(stdout);
  while (argc > 1 && stat(argv[1], &found) != 0) usleep(20000);
  printf("through\n");
  return 0;
}
