#!/usr/bin/env bash
# Build (or complete) one of the two tested environments in this checkout:
#     tools/setup_env.sh modern     Python 3.11 -> .venv
#     tools/setup_env.sh classic    Python 3.10 -> .venv-classic
# PYTHON=/path/to/python overrides the interpreter. Interrupting is safe: the next call goes on where this one stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

stack=${1:-modern}
requirements=requirements/$stack.txt
case $stack in
  # what is installed are the package's extras, in the versions that the requirements pin
  modern)  venv=.venv;         version=3.11; packages=(--constraint "$requirements")
           extras=openmmlab,huggingface,timm,natten,export,dev,docs ;;
  classic) venv=.venv-classic; version=3.10; packages=(--requirement "$requirements"); extras=dev ;;
  *) echo "setup_env.sh: unknown stack '$stack'; expected 'modern' or 'classic'" >&2; exit 2 ;;
esac
stamp=$venv/.ready
fingerprint=$(find setup.py pyproject.toml "$requirements" "$0" dinat_backbones -type f \
  \( -not -path 'dinat_backbones/*' -o -name '*.cpp' -o -name '*.h' \) | sort | xargs cat | cksum)

is_version() { "$1" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" >/dev/null 2>&1; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-} "python$version" python3 "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
    if is_version "$candidate"; then echo "$candidate"; return; fi
  done
  echo "setup_env.sh: the $stack stack needs Python $version and none was found; install it (for example 'pyenv install" \
       "$version' or your package manager's python$version with its venv module) or point PYTHON at one" >&2
  return 1
}

# Run a quiet, long command; say every half minute that it is still at work.
with_heartbeat() {
  local label=$1 start=$SECONDS pid beat
  shift
  "$@" & pid=$!
  ( while sleep 30; do echo "    ... $label: $((SECONDS - start)) s so far"; done ) & beat=$!
  trap 'kill $pid $beat 2>/dev/null' INT TERM
  local status=0
  wait $pid || status=$?
  kill $beat 2>/dev/null || true
  wait $beat 2>/dev/null || true
  trap - INT TERM
  return $status
}

if [ "$(cat "$stamp" 2>/dev/null)" = "$fingerprint" ]; then
  echo "[$stack] $venv is ready"
  exit 0
fi

if ! is_version "$venv/bin/python"; then
  python=$(find_python)
  echo "[$stack] creating $venv with $("$python" --version)"
  rm -rf "$venv"
  "$python" -m venv "$venv"
fi
[ -x "$venv/bin/uv" ] || "$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
install() { "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" "$@"; }

if [ "$stack" = classic ]; then
  echo "[$stack] 1/3 torch and the build tools"
  mapfile -t base < <(grep -E '^(torch|torchvision|numpy|setuptools)\b' "$requirements")
  with_heartbeat "downloading torch" install "${base[@]}" wheel ninja psutil cmake

  # Built once per stack and torch, then kept: a second checkout on the same machine takes the wheels from there.
  torch=$("$venv/bin/python" -c 'import torch; print(torch.__version__)')
  wheels=${XDG_CACHE_HOME:-$HOME/.cache}/dinat_backbones/$version-$torch
  echo "[$stack] 2/3 mmcv and natten (compiled from source: about 13 + 5 minutes on 2 cores, then kept in $wheels)"
  mkdir -p "$wheels"
  mapfile -t compiled < <(grep -E '^(mmcv|natten)\b' "$requirements")
  for package in "${compiled[@]}"; do
    # pip leaves nothing behind when interrupted: it moves a finished wheel here.
    CFLAGS=-g0 MMCV_WITH_OPS=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} with_heartbeat "compiling $package" \
      "$venv/bin/python" -m pip wheel -qq --disable-pip-version-check --no-cache-dir --no-build-isolation --no-deps \
        --find-links "$wheels" --wheel-dir "$wheels" "$package"
    install --find-links "$wheels" "${base[@]}" "$package"
  done
  echo "[$stack] 3/3 the rest of $requirements, and dinat_backbones with its CPU kernel"
else
  echo "[$stack] torch, the frameworks, and dinat_backbones with its CPU kernel (a download of about 4 GB, unless cached)"
fi
with_heartbeat "installing" install "${packages[@]}" --editable ".[$extras]"
if [ "$stack" = classic ]; then
  # Both pin what they need to other versions or addresses; what they need is in the requirements.
  install --no-deps panopticapi-lite==0.2.0
  install --no-deps --no-build-isolation maskformer2==0.1
fi
echo "$fingerprint" > "$stamp"
echo "[$stack] $venv is ready"
