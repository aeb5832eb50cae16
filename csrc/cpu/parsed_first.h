// What every file compiled per instruction set begins with; setup.py has it parsed once for each set.
#include "isa.h"
