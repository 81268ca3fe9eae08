#!/usr/bin/env bash
# Runs the tests: unit tests, the smoke profile through every notebook and, where TP_DATA_DIR names the real data, a few
# checks on it. Arguments go to pytest: ./run_tests.sh -k sts
set -euo pipefail
# A folder that is named from where the command is given stays that folder.
case "${TP_DATA_DIR:-/}" in /* | "~"*) ;; *) export TP_DATA_DIR="$PWD/$TP_DATA_DIR" ;; esac
cd "$(dirname "$0")"
source lib/run/environment.sh
ensure_environment
exec "$PYTHON" -m pytest "$@"
