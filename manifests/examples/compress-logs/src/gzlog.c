/* gzlog LOGS ARCHIVE BYTES: keeps what is appended to log files in compressed pieces.

   For each NAME.log of LOGS, whenever BYTES more stand in it (up to the end of a line), they are
   written to ARCHIVE as NAME.log.FROM-TO.gz. How far it is, it reads from these names, so that it can
   be stopped at any time and loses or repeats nothing. It never ends by itself. */
#include <dirent.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define WINDOW 32768
#define HASHES 32768

/* --- gzip: deflate with one block of fixed codes ------------------------------------------------ */

static FILE *sink;
static uint32_t bits;
static int bit_count;

static void put(uint32_t value, int n) {
  bits |= value << bit_count;
  for (bit_count += n; bit_count >= 8; bit_count -= 8, bits >>= 8) putc(bits & 255, sink);
}

/* Huffman codes go out with their highest bit first. */
static void put_code(uint32_t code, int n) {
  uint32_t turned = 0;
  for (int i = 0; i < n; i++) turned |= ((code >> i) & 1) << (n - 1 - i);
  put(turned, n);
}

static void put_symbol(int symbol) {
  if (symbol < 144) put_code(0x30 + symbol, 8);
  else if (symbol < 256) put_code(0x190 + symbol - 144, 9);
  else if (symbol < 280) put_code(symbol - 256, 7);
  else put_code(0xc0 + symbol - 280, 8);
}

static void put_match(int length, int distance) {
  static const int bases[] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
                              31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
  int at = 28, d = distance - 1, extra = 0;
  while (length < bases[at]) at--;
  put_symbol(257 + at);
  if (at >= 8 && at < 28) put(length - bases[at], at / 4 - 1);
  /* Distances 1-4 have codes of their own; then each power of two has two. */
  while (d >> (extra + 2)) extra++;
  if (d < 4) {
    put_code(d, 5);
  } else {
    put_code(2 * extra + (d >> extra), 5);
    put(d & ((1 << extra) - 1), extra);
  }
}

static uint32_t crc_of(const unsigned char *data, size_t size) {
  uint32_t crc = 0xffffffffu;
  for (size_t i = 0; i < size; i++) {
    crc ^= data[i];
    for (int k = 0; k < 8; k++) crc = crc & 1 ? 0xedb88320u ^ (crc >> 1) : crc >> 1;
  }
  return ~crc;
}

static int hash_at(const unsigned char *at) {
  return (at[0] * 2654435761u ^ at[1] * 40503u ^ at[2] * 2246822519u) >> 17;
}

static void put_word(uint32_t value) {
  for (int i = 0; i < 4; i++) putc(value >> (8 * i) & 255, sink);
}

static void compress(const unsigned char *data, size_t size) {
  static long last[HASHES];
  for (int i = 0; i < HASHES; i++) last[i] = -1;
  static const unsigned char head[] = {31, 139, 8, 0, 0, 0, 0, 0, 0, 255};
  fwrite(head, 1, sizeof head, sink);
  bits = bit_count = 0;
  put(1, 1); /* the last block */
  put(1, 2); /* fixed codes */
  for (size_t i = 0; i < size;) {
    size_t length = 0;
    long before = -1;
    if (i + 3 <= size) {
      int hash = hash_at(data + i);
      before = last[hash];
      last[hash] = (long)i;
      if (before >= 0 && i - before <= WINDOW)
        while (length < 258 && i + length < size && data[before + length] == data[i + length]) length++;
    }
    if (length < 3) {
      put_symbol(data[i++]);
    } else {
      put_match((int)length, (int)(i - before));
      i += length;
    }
  }
  put_symbol(256);
  if (bit_count) put(0, 8 - bit_count);
  put_word(crc_of(data, size));
  put_word((uint32_t)size);
}

/* --- files -------------------------------------------------------------------------------------- */

/* Up to where a log is in the archive: the highest TO of its pieces. */
static long long reached(const char *archive, const char *name) {
  long long best = 0, from, to;
  size_t length = strlen(name);
  DIR *d = opendir(archive);
  if (!d) return -1;
  for (struct dirent *e; (e = readdir(d));)
    if (!strncmp(e->d_name, name, length) && sscanf(e->d_name + length, ".%lld-%lld.gz", &from, &to) == 2)
      best = to > best ? to : best;
  closedir(d);
  return best;
}

static int fail(const char *path) {
  fprintf(stderr, "%s: %s\n", path, strerror(errno));
  return 1;
}

/* Puts away what is complete of one log. */
static int keep(const char *logs, const char *archive, const char *name, size_t least) {
  char path[4096], draft[4096], piece[4096];
  struct stat st;
  long long from = reached(archive, name);
  if (from < 0) return fail(archive);
  snprintf(path, sizeof path, "%s/%s", logs, name);
  if (stat(path, &st)) return fail(path);
  if (st.st_size - from < (long long)least) return 0;
  FILE *in = fopen(path, "rb");
  if (!in) return fail(path);
  size_t size = st.st_size - from;
  unsigned char *data = malloc(size);
  int is_read = data && !fseeko(in, from, SEEK_SET) && fread(data, 1, size, in) == size;
  fclose(in);
  while (is_read && size && data[size - 1] != '\n') size--;
  int rc = is_read ? 0 : fail(path);
  if (!rc && size) {
    snprintf(draft, sizeof draft, "%s/.draft", archive);
    snprintf(piece, sizeof piece, "%s/%s.%lld-%lld.gz", archive, name, from, from + (long long)size);
    sink = fopen(draft, "wb");
    if (!sink) return free(data), fail(draft);
    compress(data, size);
    long packed = ftell(sink);
    if (fclose(sink) || rename(draft, piece)) return free(data), fail(piece);
    printf("%s: %zu bytes in %ld\n", strrchr(piece, '/') + 1, size, packed);
    fflush(stdout);
  }
  free(data);
  return rc;
}

int main(int argc, char **argv) {
  if (argc != 4) return 64;
  for (;;) {
    DIR *d = opendir(argv[1]);
    if (!d) return fail(argv[1]);
    int rc = 0;
    for (struct dirent *e; !rc && (e = readdir(d));) {
      size_t length = strlen(e->d_name);
      if (length > 4 && !strcmp(e->d_name + length - 4, ".log"))
        rc = keep(argv[1], argv[2], e->d_name, strtoul(argv[3], NULL, 10));
    }
    closedir(d);
    if (rc) return rc;
    usleep(200000);
  }
}
