#!/usr/bin/env bash
# Regenerates every table and figure: creates the environment if needed, then runs the notebooks with papermill.
# ./run_all.sh --help lists the options.
set -euo pipefail
# A folder that is named from where the command is given stays that folder.
case "${TP_DATA_DIR:-/}" in /* | "~"*) ;; *) export TP_DATA_DIR="$PWD/$TP_DATA_DIR" ;; esac
cd "$(dirname "$0")"
source lib/run/environment.sh
ensure_environment
exec "$PYTHON" -m lib.run "$@"
