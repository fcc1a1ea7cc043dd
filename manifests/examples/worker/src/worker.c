/* worker INBOX DONE: a service that takes files from a directory, one after the other, and
   leaves each in upper case in another. It looks again and again, and never ends by itself.

   A file whose name begins with `poison` makes it fall over, after it was moved out of the way: so
   the restarted worker goes on with the rest. */
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static int shout(const char *from, const char *to) {
  FILE *in = fopen(from, "r"), *out = in ? fopen(to, "w") : NULL;
  if (!in || !out) return 1;
  for (int c; (c = getc(in)) != EOF;) putc(toupper(c), out);
  fclose(in);
  return fclose(out);
}

static int work(const char *inbox, const char *done) {
  DIR *d = opendir(inbox);
  if (!d) return fprintf(stderr, "%s: %s\n", inbox, strerror(errno)), 1;
  int rc = 0;
  for (struct dirent *e; !rc && (e = readdir(d));) {
    /* What is being written is hidden until it is complete. */
    if (e->d_name[0] == '.') continue;
    char from[4096], draft[4096], to[4096];
    snprintf(from, sizeof from, "%s/%s", inbox, e->d_name);
    snprintf(draft, sizeof draft, "%s/.%s", done, e->d_name);
    snprintf(to, sizeof to, "%s/%s", done, e->d_name);
    if (!strncmp(e->d_name, "poison", 6)) {
      unlink(from);
      fprintf(stderr, "%s: indigestible\n", e->d_name);
      rc = 1;
    } else if (shout(from, draft) || rename(draft, to) || unlink(from)) {
      fprintf(stderr, "%s: %s\n", e->d_name, strerror(errno));
      rc = 1;
    } else {
      printf("%s\n", e->d_name);
      fflush(stdout);
    }
  }
  closedir(d);
  return rc;
}

int main(int argc, char **argv) {
  if (argc != 3) return 64;
  fprintf(stderr, "started\n");
  for (;;) {
    if (work(argv[1], argv[2])) return 1;
    usleep(100000);
  }
}
