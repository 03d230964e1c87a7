#!/bin/sh
# check_symbols.sh LEVEL OBJECT...: every function that the objects of one instruction-set level offer to the linker
# must carry the level in its name, or the linker could hand it to a machine that cannot run it.
level=$1
shift
for object in "$@"; do
  nm -C --defined-only "$object" | awk -v level="cpu::$level::" -v object="$object" '
    $2 ~ /^[TWVu]$/ && index($0, level) == 0 { print object ": " $0; bad = 1 }
    END { exit bad }' || failed=1
done
[ -z "$failed" ] || { echo "these symbols do not belong to level $level"; exit 1; }
