// What every file beside this one begins with; setup.py has it parsed once.
#include "torch.h"
