#!/usr/bin/env bash
# What the package does on a GPU, in at most 8 minutes: is it right there, what does it cost, what does it score.
# It writes data/gpu/<device>.json, which notebook 05 shows. It installs nothing: the Python that it uses ($PYTHON, the
# project's environment or python3) needs torch, transformers, pandas, scipy and PyYAML. Try it without a GPU:
#     benchmarks/gpu.sh --tiny
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
exec "$PYTHON" -m benchmarks.gpu "$@"
