/* Atlantic hurricane seasons: one line of statistics for each year of this partition.
 *
 *   seasons [INPUT [OUTPUT-DIRECTORY]]      default /inputs/storms.csv /outputs
 *
 * The years of the input are cut into BACALHAU_PARTITION_COUNT blocks; this run takes the one of
 * number BACALHAU_PARTITION_INDEX. Its table goes to OUTPUT-DIRECTORY/seasons-NNN.csv and, for
 * reading, to stdout. Only the first partition writes headings, so that all parts, one after the
 * other, are one table.
 *
 * A storm counts once it was a tropical or subtropical storm (34 knots), as a hurricane from 64
 * and a major one from 96 knots. Accumulated cyclone energy (ACE) is the sum over all six-hourly
 * observations of at least 34 knots of the square of the wind in knots, times 1e-4.
 *
 * Exit: 0; 1 the input cannot be read, or the output written; 2 a line of the input is wrong.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { YEAR_MIN = 1800, YEAR_MAX = 2199, STORMS_MAX = 128, NAME_MAX_LENGTH = 32, FIELDS = 10 };

struct storm {
  char name[NAME_MAX_LENGTH];
  int wind, last_hour; /* strongest wind in knots; when it was last observed */
};

struct season {
  int storms, pressure; /* lowest pressure in millibars; 0 while there is none */
  double energy;        /* sum of squares, knots^2 */
  struct storm storm[STORMS_MAX];
};

static struct season *seasons[YEAR_MAX - YEAR_MIN + 1];

static int fail(const char *what) {
  fprintf(stderr, "seasons: %s: %s\n", what, strerror(errno));
  return 1;
}

/* A whole decimal number between limits; -1 and a complaint if it is not one. */
static int number(const char *text, int min, int max, const char *what, long line) {
  char *end;
  long value = strtol(text, &end, 10);
  if (end == text || *end || value < min || value > max) {
    fprintf(stderr, "seasons: line %ld: %s is '%s', not a number from %d to %d\n", line, what,
            text, min, max);
    return -1;
  }
  return (int)value;
}

/* Cuts a line at its commas; returns how many fields it has. */
static int cut(char *line, char **fields) {
  int count = 0;
  line[strcspn(line, "\r\n")] = 0;
  for (char *at = line; at; count++) {
    char *comma = strchr(at, ',');
    if (comma) *comma++ = 0;
    if (count < FIELDS) fields[count] = at;
    at = comma;
  }
  return count;
}

static struct storm *find(struct season *season, const char *name) {
  for (int i = 0; i < season->storms; i++)
    if (!strcmp(season->storm[i].name, name)) return &season->storm[i];
  if (season->storms == STORMS_MAX || strlen(name) >= NAME_MAX_LENGTH) return NULL;
  struct storm *storm = &season->storm[season->storms++];
  strcpy(storm->name, name);
  storm->last_hour = -1;
  return storm;
}

static int add(char **f, long line) {
  int year = number(f[0], YEAR_MIN, YEAR_MAX, "year", line);
  int month = number(f[1], 1, 12, "month", line);
  int day = number(f[2], 1, 31, "day", line);
  int hour = number(f[3], 0, 23, "hour", line);
  int wind = number(f[8], 0, 250, "wind", line);
  int pressure = number(f[9], 800, 1100, "pressure", line);
  if (year < 0 || month < 0 || day < 0 || hour < 0 || wind < 0 || pressure < 0) return 2;
  struct season **season = &seasons[year - YEAR_MIN];
  if (!*season && !(*season = calloc(1, sizeof **season))) return fail("memory");
  int is_storm = !strcmp(f[5], "tropical storm") || !strcmp(f[5], "subtropical storm") ||
                 !strcmp(f[5], "hurricane");
  if (!is_storm || wind < 34) return 0;
  struct storm *storm = find(*season, f[4]);
  if (!storm) {
    fprintf(stderr, "seasons: line %ld: too many storms, or too long a name\n", line);
    return 2;
  }
  if (wind > storm->wind) storm->wind = wind;
  if (!(*season)->pressure || pressure < (*season)->pressure) (*season)->pressure = pressure;
  /* Landfalls are observed in between, and would count twice. */
  int when = (month * 31 + day) * 24 + hour;
  if (hour % 6 == 0 && when != storm->last_hour) (*season)->energy += (double)wind * wind;
  storm->last_hour = when;
  return 0;
}

static int read_all(const char *path) {
  FILE *in = fopen(path, "r");
  if (!in) return fail(path);
  char text[512], *fields[FIELDS];
  int rc = 0;
  for (long line = 1; !rc && fgets(text, sizeof text, in); line++) {
    if (cut(text, fields) != FIELDS) {
      fprintf(stderr, "seasons: line %ld: not %d fields\n", line, FIELDS);
      rc = 2;
    } else if (line > 1) {
      rc = add(fields, line);
    } else if (strcmp(fields[0], "year") || strcmp(fields[9], "pressure")) {
      fprintf(stderr, "seasons: line 1: not the headings of a storm table\n");
      rc = 2;
    }
  }
  if (!rc && ferror(in)) rc = fail(path);
  fclose(in);
  return rc;
}

static void write_season(FILE *out, int year, const struct season *season) {
  int hurricanes = 0, major = 0;
  const struct storm *strongest = NULL;
  for (int i = 0; i < season->storms; i++) {
    const struct storm *storm = &season->storm[i];
    hurricanes += storm->wind >= 64;
    major += storm->wind >= 96;
    if (!strongest || storm->wind > strongest->wind) strongest = storm;
  }
  double ace = season->energy / 1e4;
  const char *name = strongest ? strongest->name : "";
  int wind = strongest ? strongest->wind : 0;
  fprintf(out, "%d,%d,%d,%d,%.1f,%d,%d,%s\n", year, season->storms, hurricanes, major, ace, wind,
          season->pressure, name);
  printf("%4d  %6d  %10d  %5d  %6.1f  %8d  %s\n", year, season->storms, hurricanes, major, ace,
         wind, name);
}

static int setting(const char *name, int otherwise) {
  const char *text = getenv(name);
  return text && *text ? atoi(text) : otherwise;
}

int main(int argc, char **argv) {
  const char *input = argc > 1 ? argv[1] : "/inputs/storms.csv";
  const char *directory = argc > 2 ? argv[2] : "/outputs";
  int index = setting("BACALHAU_PARTITION_INDEX", 0), count = setting("BACALHAU_PARTITION_COUNT", 1);
  if (count < 1 || index < 0 || index >= count) {
    fprintf(stderr, "seasons: partition %d of %d does not exist\n", index, count);
    return 2;
  }
  int rc = read_all(input);
  if (rc) return rc;
  int years = 0, seen = 0;
  for (int i = 0; i <= YEAR_MAX - YEAR_MIN; i++) years += seasons[i] != NULL;
  int first = (int)((long)years * index / count), after = (int)((long)years * (index + 1) / count);

  char path[4096];
  snprintf(path, sizeof path, "%s/seasons-%03d.csv", directory, index);
  FILE *out = fopen(path, "w");
  if (!out) return fail(path);
  if (index == 0) {
    fprintf(out, "year,storms,hurricanes,major,ace,max_wind_knots,min_pressure_mb,strongest\n");
    printf("year  storms  hurricanes  major     ACE  max wind  strongest\n");
  }
  for (int i = 0; i <= YEAR_MAX - YEAR_MIN; i++) {
    if (!seasons[i]) continue;
    if (seen >= first && seen < after) write_season(out, YEAR_MIN + i, seasons[i]);
    seen++;
  }
  if (fclose(out)) return fail(path);
  return fflush(stdout) ? fail("stdout") : 0;
}
