#!/usr/bin/env bash
# A browser for the tests that look at reports, where this user may install one. Without it they are skipped and say so.
set -euo pipefail
for name in chromium chromium-browser google-chrome chrome; do
  if command -v "$name" >/dev/null; then exit 0; fi
done
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "no Chromium, and no right to install one: tests of pages in a browser will be skipped"
  exit 0
fi
log=$(mktemp)
export DEBIAN_FRONTEND=noninteractive
if timeout 300 sh -c "apt-get update && apt-get install -y chromium" >"$log" 2>&1; then
  echo "installed $(chromium --version 2>/dev/null || echo Chromium) for the tests of pages"
else
  tail -n 3 "$log"
  echo "Chromium could not be installed: tests of pages in a browser will be skipped"
fi
rm -f "$log"
