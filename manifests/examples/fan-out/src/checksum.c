/* checksum DIR OUT: CRC-32 and size of files, as lines `CRC SIZE NAME` in OUT/part-NNN.txt.

   The names of DIR are sorted; of N partitions, number I takes every N-th of them, from the I-th
   on. So each file is taken by one partition, whatever N is. */
#include <dirent.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static uint32_t table[256];

static void make_table(void) {
  for (uint32_t i = 0; i < 256; i++) {
    uint32_t c = i;
    for (int k = 0; k < 8; k++) c = c & 1 ? 0xedb88320u ^ (c >> 1) : c >> 1;
    table[i] = c;
  }
}

static int compare(const void *a, const void *b) {
  return strcmp(*(char *const *)a, *(char *const *)b);
}

static int number(const char *name, int otherwise) {
  const char *text = getenv(name);
  return text ? atoi(text) : otherwise;
}

static int check(const char *dir, const char *name, FILE *out) {
  char path[4096];
  static unsigned char buffer[1 << 16];
  snprintf(path, sizeof path, "%s/%s", dir, name);
  FILE *in = fopen(path, "rb");
  if (!in) return fprintf(stderr, "%s: %s\n", path, strerror(errno)), 1;
  uint32_t crc = 0xffffffffu;
  long long size = 0;
  for (size_t n; (n = fread(buffer, 1, sizeof buffer, in)) > 0; size += n)
    for (size_t i = 0; i < n; i++) crc = table[(crc ^ buffer[i]) & 255] ^ (crc >> 8);
  int failed = ferror(in);
  fclose(in);
  if (failed) return fprintf(stderr, "%s: cannot be read\n", path), 1;
  fprintf(out, "%08x %lld %s\n", crc ^ 0xffffffffu, size, name);
  return 0;
}

int main(int argc, char **argv) {
  if (argc != 3) return 64;
  int index = number("BACALHAU_PARTITION_INDEX", 0), count = number("BACALHAU_PARTITION_COUNT", 1);
  DIR *d = opendir(argv[1]);
  if (!d) return fprintf(stderr, "%s: %s\n", argv[1], strerror(errno)), 1;
  char **names = NULL, path[4096];
  size_t found = 0;
  for (struct dirent *e; (e = readdir(d));) {
    struct stat st;
    snprintf(path, sizeof path, "%s/%s", argv[1], e->d_name);
    if (stat(path, &st) || !S_ISREG(st.st_mode)) continue;
    names = realloc(names, (found + 1) * sizeof *names);
    names[found++] = strdup(e->d_name);
  }
  closedir(d);
  qsort(names, found, sizeof *names, compare);
  make_table();
  snprintf(path, sizeof path, "%s/part-%03d.txt", argv[2], index);
  FILE *out = fopen(path, "w");
  if (!out) return fprintf(stderr, "%s: %s\n", path, strerror(errno)), 1;
  int rc = 0, mine = 0;
  for (size_t i = index; i < found; i += count, mine++) rc |= check(argv[1], names[i], out);
  if (fclose(out)) return 1;
  printf("partition %d of %d: %d of %zu files\n", index, count, mine, found);
  return rc;
}
