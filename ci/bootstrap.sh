#!/usr/bin/env bash
# Makes (or reuses) the one environment that everything shares: .venv. Prints nothing when there is nothing to do.
# Finds a Python >= 3.12 itself, since python3 is often older and a python3.12 on PATH may be a shim that fails.
# NEMO_OPT_SYSTEM_PACKAGES=1, for NVIDIA's containers: what the system has stays in use, its torch is built for its CUDA and its drivers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

env_dir="${NEMO_OPT_ENV:-$PWD/.venv}"
python="$env_dir/bin/python"
stamp="$env_dir/.nemo_opt-stamp"
want="$(cat pyproject.toml ci/constraints.txt ci/bootstrap.sh | sha256sum | cut -c1-16)"

is_ready() { [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && "$python" -c 'import nemo_opt' 2>/dev/null; }
is_ready && exit 0

exec 9>"$env_dir.lock" # two bootstraps at once: the second waits, then finds the work done
flock --timeout 1800 9 || { echo "bootstrap: another bootstrap has held $env_dir.lock for 30 minutes; remove it if it is dead" >&2; exit 1; }
is_ready && exit 0

tried=""
works() { # a real interpreter, new enough, that can make environments
  local answer
  answer="$("$1" -c 'import sys, ensurepip, venv; print("ok" if sys.version_info >= (3, 12) else "too old:", sys.version.split()[0])' 2>&1 | grep -m 1 .)" || true
  tried+="  $1: ${answer:-no answer}"$'\n'
  [ "${answer%% *}" = ok ]
}
find_python() {
  local candidate
  for candidate in "${NEMO_OPT_PYTHON:-}" python3.12 "$HOME"/.pyenv/versions/3.12*/bin/python "${PYENV_ROOT:-/nonexistent}"/versions/3.12*/bin/python \
    /opt/python/3.12*/bin/python /usr/bin/python3.12 /usr/local/bin/python3.12 python3 python python3.13 python3.14 \
    "$HOME"/.pyenv/versions/3.1[3-9]*/bin/python; do
    candidate="$(command -v "${candidate:-/nonexistent}" || true)"
    if [ -n "$candidate" ] && works "$candidate"; then
      echo "$candidate"
      return
    fi
  done
}
if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
  echo "bootstrap: bringing $env_dir up to date"
else
  base="$(find_python; printf '%s' "$tried" >"$env_dir.tried")"
  tried="$(cat "$env_dir.tried" && rm -f "$env_dir.tried")"
  if [ -z "$base" ]; then
    printf 'bootstrap: no Python >= 3.12 with venv and ensurepip (megatron-core >= 0.17 needs it). Tried:\n%s\nInstall one, or name it: NEMO_OPT_PYTHON=/path/to/python bash ci/bootstrap.sh\n' "$tried" >&2
    exit 1
  fi
  echo "bootstrap: $("$base" --version) at $base -> $env_dir (torch is several GB; minutes on a slow network)"
  "$base" -m venv --clear ${NEMO_OPT_SYSTEM_PACKAGES:+--system-site-packages} "$env_dir"
fi
if [ -n "${NEMO_OPT_SYSTEM_PACKAGES:-}" ]; then
  "$python" ci/constraints_beside_system.py >"$env_dir.constraints"
  # Not uv, which does not see the packages of the system.
  "$python" -m pip install --quiet --disable-pip-version-check --constraint "$env_dir.constraints" --editable '.[dev]'
  rm "$env_dir.constraints"
  echo "$want" >"$stamp"
  echo "bootstrap: ready in ${SECONDS} s, beside the packages of the system"
  exit 0
fi
uv="$(command -v uv || command -v "$env_dir/bin/uv" || true)"
if [ -z "$uv" ]; then
  "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null
  "$python" -m pip install -qq --disable-pip-version-check --constraint ci/constraints.txt uv
  uv="$env_dir/bin/uv"
fi
# Bytecode, as pip makes it: where Python may not write it, each process would compile the stack anew (measured: 18 s to import, 9 s with).
"$uv" pip install --quiet --compile-bytecode --python "$python" --constraint ci/constraints.txt --editable '.[dev]'
echo "$want" >"$stamp"
echo "bootstrap: ready in ${SECONDS} s ($("$python" -c 'import importlib.metadata as m; print(", ".join(p + " " + m.version(p) for p in ("torch", "megatron-core", "nvidia-modelopt", "transformers")))'))"
