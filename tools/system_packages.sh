#!/usr/bin/env bash
# Installs the Debian packages that the tests need and this machine lacks: for namespaces and bad
# links, for git inputs, and an engine and a registry that the tests start by themselves.
set -euo pipefail

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

missing=()
command -v python3 >/dev/null || missing+=(python3)
python3 -c 'import venv, ensurepip' 2>/dev/null || missing+=(python3-venv)
PATH="$PATH:/usr/sbin:/sbin"
command -v ip >/dev/null && command -v tc >/dev/null || missing+=(iproute2)
command -v nft >/dev/null || missing+=(nftables)
command -v unshare >/dev/null || missing+=(util-linux)
# For git inputs.
command -v git >/dev/null || missing+=(git)
# For the docker engine: its tests start an engine and a registry of their own.
command -v dockerd >/dev/null || missing+=(docker.io)
command -v iptables >/dev/null || missing+=(iptables)
command -v docker-registry >/dev/null || missing+=(docker-registry)
command -v htpasswd >/dev/null || missing+=(apache2-utils)
{ command -v busybox >/dev/null && ! head -c 4096 "$(command -v busybox)" | grep -aq ld-linux; } || missing+=(busybox-static)
if [ ${#missing[@]} -gt 0 ]; then
  as_root apt-get update -qq
  # Run level 1: what is installed is not started.
  as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi
