#!/bin/sh
# The whole way in one go: start a server on a temporary directory, run the job, download its
# results, show them, and clean up. Uses the `bacalhau` on PATH. See README.md.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)

clean_up() {
  if [ -n "${server:-}" ]; then
    kill "$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
  fi
  rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

bacalhau serve --data-dir "$work/data" --port 0 --nats-port -1 --on-exit stop \
  --allow-path "$here" --allow-path "$here/**" >"$work/serve.log" 2>&1 &
server=$!
while [ ! -e "$work/data/serve.json" ]; do
  kill -0 "$server" 2>/dev/null || { cat "$work/serve.log" >&2; exit 1; }
  sleep 0.1
done
BACALHAU_SERVER=$(sed 's/.*"api": "\([^"]*\)".*/\1/' "$work/data/serve.json")
export BACALHAU_SERVER

sed "s|/srv/hurricanes|$here|" "$here/job.yaml" | bacalhau apply -f -
bacalhau wait hurricanes --for delivered --timeout 120
bacalhau get executions
bacalhau download hurricanes --output "$work/results"
cat "$work/results/stdout"
cat "$work"/results/seasons/*.csv | awk -F, \
  '$1 ~ /^[0-9]+$/ { n++; x += $1; y += $5; xx += $1 * $1; xy += $1 * $5 }
   END { printf "\n%d seasons; the energy of a season changed by %+.2f ACE a year\n",
         n, (n * xy - x * y) / (n * xx - x * x) }'
