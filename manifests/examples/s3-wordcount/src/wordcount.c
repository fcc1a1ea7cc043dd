/* wordcount IN OUT: counts the words of all files below IN into OUT/counts.tsv, most frequent first,
   and prints how many files, words and different words there were. A word is a run of ASCII letters
   and of bytes above 127; letters are folded to lower case. */
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

struct word {
  char *text;
  unsigned long count;
};

static struct word *table;
static size_t slots, used;
static unsigned long files, words;

static void fail(const char *what) {
  fprintf(stderr, "%s: %s\n", what, strerror(errno));
  exit(1);
}

static size_t hash(const char *text) {
  size_t value = 5381;
  while (*text) value = value * 33 ^ (unsigned char)*text++;
  return value;
}

static struct word *find(struct word *in, size_t size, const char *text) {
  size_t at = hash(text) & (size - 1);
  while (in[at].text && strcmp(in[at].text, text)) at = (at + 1) & (size - 1);
  return &in[at];
}

static void grow(void) {
  size_t size = slots ? slots * 2 : 1 << 12;
  struct word *bigger = calloc(size, sizeof *bigger);
  if (!bigger) fail("memory");
  for (size_t i = 0; i < slots; i++)
    if (table[i].text) *find(bigger, size, table[i].text) = table[i];
  free(table);
  table = bigger;
  slots = size;
}

static void count(const char *text) {
  if (used * 2 >= slots) grow();
  struct word *found = find(table, slots, text);
  if (!found->text) {
    if (!(found->text = strdup(text))) fail("memory");
    used++;
  }
  found->count++;
  words++;
}

static void read_file(const char *path) {
  FILE *file = fopen(path, "rb");
  if (!file) fail(path);
  char word[256];
  size_t length = 0;
  for (int c; ; ) {
    c = getc(file);
    if (c != EOF && (isalpha(c) || c > 127)) {
      if (length < sizeof word - 1) word[length++] = (char)tolower(c);
      continue;
    }
    if (length) {
      word[length] = 0;
      count(word);
      length = 0;
    }
    if (c == EOF) break;
  }
  if (ferror(file)) fail(path);
  fclose(file);
  files++;
}

static void walk(const char *path) {
  DIR *directory = opendir(path);
  if (!directory) fail(path);
  for (struct dirent *entry; (entry = readdir(directory));) {
    if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
    char below[4096];
    struct stat status;
    snprintf(below, sizeof below, "%s/%s", path, entry->d_name);
    if (stat(below, &status)) fail(below);
    if (S_ISDIR(status.st_mode)) walk(below);
    else read_file(below);
  }
  closedir(directory);
}

static int order(const void *a, const void *b) {
  const struct word *x = a, *y = b;
  if (x->count != y->count) return x->count < y->count ? 1 : -1;
  return x->text && y->text ? strcmp(x->text, y->text) : 0;
}

int main(int argc, char **argv) {
  if (argc != 3) {
    fprintf(stderr, "usage: wordcount IN OUT\n");
    return 2;
  }
  grow();
  walk(argv[1]);
  qsort(table, slots, sizeof *table, order);
  char path[4096];
  snprintf(path, sizeof path, "%s/counts.tsv", argv[2]);
  FILE *out = fopen(path, "w");
  if (!out) fail(path);
  for (size_t i = 0; i < used; i++) fprintf(out, "%lu\t%s\n", table[i].count, table[i].text);
  if (fclose(out)) fail(path);
  printf("%lu files, %lu words, %zu different\n", files, words, used);
  return 0;
}
