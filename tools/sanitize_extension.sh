#!/bin/sh
# The torch extension under sanitizers. The sanitized libraries are built in a copy of the tree, so that the ones in use
# stay as they are. Environment: PYTHON, CXX.
#
#   sanitize_extension.sh memory   AddressSanitizer and UndefinedBehaviorSanitizer: every case table on the CPU column
#   sanitize_extension.sh device   the same for every CUDA kernel on the emulated device, on a few small cases
#   sanitize_extension.sh races    ThreadSanitizer, each emulated thread a fiber of its own: the same kernels and cases,
#                                  but for float16's; further arguments name ops
set -eu
kind=$1
shift
copy=build/sanitize-$kind
mkdir -p "$copy"
cp -ru csrc grokkernels tests tools setup.py pyproject.toml README.md LICENSE "$copy/"
cd "$copy"
flags="-O1 -g -fno-omit-frame-pointer" without=
case $kind in
  memory) columns=cpu sanitizer=address,undefined library=libasan.so flags="$flags -fno-sanitize-recover=all" ;;
  device)
    # A kernel has the address of a tile before it knows whether there is one, from null too where a tensor is empty:
    # on a GPU that is plain arithmetic, and what is read is what counts.
    columns=emulated sanitizer=address,undefined library=libasan.so
    flags="$flags -fno-sanitize-recover=all" without=-fno-sanitize=pointer-overflow
    ;;
  races) columns=emulated sanitizer=thread library=libtsan.so ;;
  *) echo "sanitize_extension.sh: memory, device or races, got '$kind'" >&2 && exit 2 ;;
esac
rm -f grokkernels/_C_*.so
[ "$columns" != cpu ] || rm -f grokkernels/_C.*.so
GROKKERNELS_COLUMNS=$columns CXXFLAGS="$flags -fsanitize=$sanitizer $without" LDFLAGS="-fsanitize=$sanitizer" \
  "$PYTHON" setup.py -q build_ext --inplace
# Python itself is not built with the sanitizer: its runtime is loaded first, and leaks of the interpreter are not ours.
runtime="$(${CXX:-c++} -print-file-name=$library) $(${CXX:-c++} -print-file-name=libstdc++.so)"
case $kind in
  memory)
    # The levels with products of bfloat16 are avx512 in every other dtype.
    same="not (float32-cpu-avx512bf16 or -float16-cpu-avx512bf16 or float32-cpu-amx or -float16-cpu-amx)"
    LD_PRELOAD="$runtime" ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 \
      "$PYTHON" -m pytest tests/ops -n 2 -p no:cacheprovider -k "(float64_rule or layouts or bad_input) and not emulated and not triton and $same"
    ;;
  device)
    LD_PRELOAD="$runtime" ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 GROKKERNELS_SEEDS=1 \
      "$PYTHON" -m pytest tests/device/test_schedules.py -n 2 -p no:cacheprovider
    ;;
  races)
    # The race checker needs the memory where it expects it: without randomised addresses. One found is exit code 66.
    TSAN_OPTIONS=ignore_noninstrumented_modules=1 setarch -R env LD_PRELOAD="$runtime" \
      "$PYTHON" -m tests.device.race_check "$@"
    ;;
esac
