#!/bin/sh
# Builds the sdist, a wheel from it, installs the wheel into an environment of its own and tries it there: does the
# archive hold all that a build needs, and does the result run away from this tree? Environment: PYTHON, TORCH.
set -eu
out=$(pwd)/build/dist
rm -rf "$out"
mkdir -p "$out"
"$PYTHON" -m venv "$out/env"
"$out/env/bin/pip" install --quiet --upgrade pip
"$out/env/bin/pip" install --quiet "$TORCH" build
"$out/env/bin/python" -m build --sdist --outdir "$out" . >"$out/sdist.log"
"$out/env/bin/pip" wheel --quiet --no-deps --wheel-dir "$out" "$out"/grokkernels-*.tar.gz
"$out/env/bin/pip" install --quiet "$out"/grokkernels-*.whl
ls -l "$out"/grokkernels-*
cd "$out"
env/bin/grokkernels doctor
env/bin/grokkernels verify --quick
