/* inventory DIR: one line on what is below a directory of this node: files, bytes, the largest. */
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static long long files, bytes, largest_size = -1;
static char largest[4096] = "-";

static int look(const char *dir) {
  DIR *d = opendir(dir);
  if (!d) return fprintf(stderr, "%s: %s\n", dir, strerror(errno)), 1;
  int rc = 0;
  for (struct dirent *e; (e = readdir(d));) {
    if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
    char path[4096];
    struct stat st;
    if (snprintf(path, sizeof path, "%s/%s", dir, e->d_name) >= (int)sizeof path) continue;
    if (lstat(path, &st)) {
      rc = 1;
    } else if (S_ISDIR(st.st_mode)) {
      rc |= look(path);
    } else if (S_ISREG(st.st_mode)) {
      files++;
      bytes += st.st_size;
      if (st.st_size > largest_size || (st.st_size == largest_size && strcmp(path, largest) < 0)) {
        largest_size = st.st_size;
        strcpy(largest, path);
      }
    }
  }
  closedir(d);
  return rc;
}

int main(int argc, char **argv) {
  const char *node = getenv("BACALHAU_NODE_ID");
  if (argc != 2) return 64;
  int rc = look(argv[1]);
  printf("%s: %lld files, %lld bytes, largest %s\n", node ? node : "?", files, bytes, largest);
  return rc;
}
