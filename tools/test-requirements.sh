#!/bin/sh
# Installs what the tests need besides Python packages: a Chromium for the report's pages and promtool for the
# metrics, from the distribution's packages. Where that cannot be done the tests that need them are skipped and say so.
# Says which programs were found, and which were installed.
set -u

find_chromium() {
    command -v chromium || command -v chromium-browser || command -v google-chrome
}

find_promtool() {
    command -v promtool
}

missing=""
find_chromium >/dev/null || missing="$missing chromium"
find_promtool >/dev/null || missing="$missing prometheus"
before="chromium=$(find_chromium) promtool=$(find_promtool)"

if [ -n "$missing" ]; then
    if command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ]; then
        echo "installing$missing for the tests"
        # A package's service must not start because a test needs its tools.
        export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
        apt-get update -qq && apt-get install -y -qq --no-install-recommends $missing >/dev/null || \
            echo "could not install$missing"
    else
        echo "not installed, and not to be installed here:$missing"
    fi
fi

for name in chromium promtool; do
    path=$("find_$name")
    case "$before " in
        *"$name=$path "*) how=found ;;
        *) how=installed ;;
    esac
    if [ -n "$path" ]; then
        echo "$how: $name, $path, $("$path" --version 2>/dev/null | head -n 1 | cut -d ' ' -f 1-3)"
    else
        echo "missing: $name; the tests that need it are skipped"
    fi
done
echo "found: python, $(command -v python3), $(python3 --version 2>&1); make, $(command -v make)"
exit 0
