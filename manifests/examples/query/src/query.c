/* query DIR WHERE BY SUM: groups the rows of all *.csv files of a directory.

   WHERE is COLUMN=VALUE, COLUMN<NUMBER or COLUMN>NUMBER, or - for all rows; BY a column to group
   by, SUM a column to add up. Writes `key,rows,sum,min,max` to stdout, sorted by key. Columns are
   found by the first line of each file; a field with a comma in it stands in double quotes. */
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FIELDS 256

struct group {
  char *key;
  long long rows;
  double sum, min, max;
};
static struct group *groups;
static size_t count, room;

static int by_key(const void *a, const void *b) {
  return strcmp(((const struct group *)a)->key, ((const struct group *)b)->key);
}

/* Cuts a line into fields, in place. */
static int cut(char *line, char **fields) {
  int n = 0;
  for (char *at = line; n < FIELDS;) {
    if (*at == '"') {
      char *to = ++at;
      fields[n++] = to;
      for (; *at; at++) {
        if (*at == '"' && *++at != '"') break;
        *to++ = *at;
      }
      char end = *at;
      *to = 0;
      if (end != ',') return n;
      at++;
    } else {
      fields[n++] = at;
      at = strchr(at, ',');
      if (!at) return n;
      *at++ = 0;
    }
  }
  return n;
}

static int column(char **fields, int n, const char *name, size_t length) {
  for (int i = 0; i < n; i++)
    if (strlen(fields[i]) == length && !strncmp(fields[i], name, length)) return i;
  return -1;
}

static void add(const char *key, double value) {
  for (size_t i = 0; i < count; i++)
    if (!strcmp(groups[i].key, key)) {
      struct group *g = &groups[i];
      g->rows++;
      g->sum += value;
      if (value < g->min) g->min = value;
      if (value > g->max) g->max = value;
      return;
    }
  if (count == room) groups = realloc(groups, (room = room ? 2 * room : 64) * sizeof *groups);
  groups[count++] = (struct group){strdup(key), 1, value, value, value};
}

static int query(const char *path, char **argv) {
  FILE *in = fopen(path, "r");
  if (!in) return fprintf(stderr, "%s: %s\n", path, strerror(errno)), 1;
  char *line = NULL, *fields[FIELDS];
  size_t size = 0, word = strcspn(argv[2], "=<>");
  int where = -1, by = -1, sum = -1, is_first = 1, rc = 0;
  char sign = argv[2][word];
  const char *wanted = sign ? argv[2] + word + 1 : "";
  for (ssize_t length; !rc && (length = getline(&line, &size, in)) >= 0; is_first = 0) {
    line[strcspn(line, "\r\n")] = 0;
    int n = cut(line, fields);
    if (is_first) {
      by = column(fields, n, argv[3], strlen(argv[3]));
      sum = column(fields, n, argv[4], strlen(argv[4]));
      where = sign ? column(fields, n, argv[2], word) : 0;
      if (by < 0 || sum < 0 || where < 0)
        rc = (fprintf(stderr, "%s: lacks a column of the query\n", path), 65);
      continue;
    }
    if (by >= n || sum >= n || where >= n) continue;
    double value = strtod(fields[where], NULL), limit = strtod(wanted, NULL);
    int fits = sign == '<' ? value < limit : sign == '>' ? value > limit : !strcmp(fields[where], wanted);
    if (!sign || fits) add(fields[by], strtod(fields[sum], NULL));
  }
  free(line);
  fclose(in);
  return rc;
}

int main(int argc, char **argv) {
  if (argc != 5) return fprintf(stderr, "use: query DIR WHERE BY SUM\n"), 64;
  DIR *d = opendir(argv[1]);
  if (!d) return fprintf(stderr, "%s: %s\n", argv[1], strerror(errno)), 1;
  int rc = 0, files = 0;
  for (struct dirent *e; (e = readdir(d));) {
    size_t length = strlen(e->d_name);
    if (length < 5 || strcmp(e->d_name + length - 4, ".csv")) continue;
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", argv[1], e->d_name);
    int code = query(path, argv);
    rc = rc ? rc : code;
    files++;
  }
  closedir(d);
  qsort(groups, count, sizeof *groups, by_key);
  for (size_t i = 0; i < count; i++)
    printf("%s,%lld,%.10g,%.10g,%.10g\n", groups[i].key, groups[i].rows, groups[i].sum,
           groups[i].min, groups[i].max);
  const char *node = getenv("BACALHAU_NODE_ID");
  fprintf(stderr, "%s: %d files, %zu groups\n", node ? node : "?", files, count);
  return rc;
}
