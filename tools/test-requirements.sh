#!/bin/sh
# Installs what the tests need besides Python packages: a Chromium for the report's pages and promtool for the
# metrics, from the distribution's packages. Where that cannot be done the tests that need them are skipped and say so.
set -u

missing=""
command -v chromium >/dev/null 2>&1 || command -v chromium-browser >/dev/null 2>&1 || \
    command -v google-chrome >/dev/null 2>&1 || missing="$missing chromium"
command -v promtool >/dev/null 2>&1 || missing="$missing prometheus"
[ -n "$missing" ] || exit 0

if command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ]; then
    echo "installing$missing for the tests"
    # A package's service must not start because a test needs its tools.
    export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
    apt-get update -qq && apt-get install -y -qq --no-install-recommends $missing >/dev/null || \
        echo "could not install$missing; the tests that need them are skipped"
else
    echo "not installed:$missing; the tests that need them are skipped"
fi
exit 0
