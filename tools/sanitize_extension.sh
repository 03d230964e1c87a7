#!/bin/sh
# The case tables of every op through the torch extension, built with AddressSanitizer and UndefinedBehaviorSanitizer.
# The sanitized library is built in a copy of the tree, so that the one in use stays as it is. Environment: PYTHON, CXX.
set -eu
copy=build/sanitize
mkdir -p "$copy"
cp -ru csrc grokkernels tests tools setup.py pyproject.toml README.md LICENSE "$copy/"
cd "$copy"
rm -f grokkernels/_C*.so
CXXFLAGS="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all" \
  LDFLAGS="-fsanitize=address,undefined" "$PYTHON" setup.py -q build_ext --inplace
# Python itself is not built with the sanitizer: its runtime is loaded first, and leaks of the interpreter are not ours.
runtime=$(${CXX:-c++} -print-file-name=libasan.so)
LD_PRELOAD="$runtime $(${CXX:-c++} -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 \
  "$PYTHON" -m pytest tests/ops -n 2 -p no:cacheprovider -k "float64_rule or layouts or bad_input"
