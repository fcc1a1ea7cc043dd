/* walk DIR: lists what lies below, with sizes.  walk read FILE: prints it.
   walk write FILE TEXT: writes it.  walk link TARGET NAME: makes a symbolic link.
   walk fill FILE N: writes N bytes. */
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int fail(const char *what) {
  fprintf(stderr, "%s: %s\n", what, strerror(errno));
  return 1;
}

static int walk(const char *dir) {
  DIR *d = opendir(dir);
  if (!d) return fail(dir);
  int rc = 0;
  for (struct dirent *e; (e = readdir(d));) {
    if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
    char path[4096];
    struct stat st;
    snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
    if (lstat(path, &st)) {
      rc = fail(path);
    } else if (S_ISDIR(st.st_mode)) {
      rc |= walk(path);
    } else {
      printf("%s %lld\n", path, (long long)st.st_size);
    }
  }
  closedir(d);
  return rc;
}

int main(int argc, char **argv) {
  if (argc == 3 && !strcmp(argv[1], "read")) {
    FILE *f = fopen(argv[2], "rb");
    char block[4096];
    if (!f) return fail(argv[2]);
    for (size_t n; (n = fread(block, 1, sizeof block, f)) > 0;) fwrite(block, 1, n, stdout);
    return ferror(f) ? fail(argv[2]) : 0;
  }
  if (argc == 4 && !strcmp(argv[1], "write")) {
    FILE *f = fopen(argv[2], "wb");
    if (!f || fputs(argv[3], f) < 0 || fclose(f)) return fail(argv[2]);
    return 0;
  }
  if (argc == 4 && !strcmp(argv[1], "fill")) {
    FILE *f = fopen(argv[2], "wb");
    static char block[65536];
    if (!f) return fail(argv[2]);
    for (long left = atol(argv[3]); left > 0; left -= sizeof block)
      if (fwrite(block, 1, sizeof block, f) < sizeof block) return fail(argv[2]);
    return fclose(f) ? fail(argv[2]) : 0;
  }
  if (argc == 4 && !strcmp(argv[1], "link")) return symlink(argv[2], argv[3]) ? fail(argv[3]) : 0;
  return walk(argc > 1 ? argv[1] : "/");
}
