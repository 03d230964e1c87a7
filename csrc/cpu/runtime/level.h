// Which instruction-set level runs: found when the library loads, lowered by GROKKERNELS_CPU_LEVEL or by a test.
#pragma once

namespace grokkernels::cpu {

enum Level : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4, kNumLevels = 5 };

// Name of a level as levels.txt spells it; nullptr outside 0 .. kNumLevels - 1.
const char* level_name(int level);

// The highest level that this build holds and this machine can execute. The first call asks Linux for the matrix unit's
// registers, which a process has only by permission; it then holds for all of its threads.
int highest_level();

// The level every launcher uses now.
int level();

// Sets the level by name. Throws std::invalid_argument naming what is allowed when the machine does not have it.
void set_level(const char* name);

}  // namespace grokkernels::cpu
