// The one place where CPU kernels are chosen: what this CPU has, what FASTFT_ISA allows, and the table in use.
// Compiled once, for the baseline; every other file of this folder is compiled once per instruction set.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace fastft::cpu {

// Weak: a set that the compiler could not build is not in the library, and its address is null.
#define FASTFT_TABLE(isa)                           \
  namespace isa {                                   \
  extern const Kernels table __attribute__((weak)); \
  }
FASTFT_TABLE(baseline)
FASTFT_TABLE(avx2)
FASTFT_TABLE(avx512)
FASTFT_TABLE(avx512_bf16)
#undef FASTFT_TABLE

namespace {

struct Set {
  const char* name;
  const Kernels* kernels;
  bool supported;
};

struct Choice {
  Set sets[4];
  const Set* used;      // switched by tests only; neither is while a kernel runs
  bool widens = false;  // bf16 is multiplied in fp32, though there is VDPBF16PS: by measurement, it may be slower
  char names[64];

  Choice()
      : sets{{"baseline", &baseline::table, true},
             {"avx2", &avx2::table, false},
             {"avx512", &avx512::table, false},
             {"avx512_bf16", &avx512_bf16::table, false}} {
#if defined(__x86_64__)
    __builtin_cpu_init();
    sets[1].supported =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    sets[2].supported = sets[1].supported && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    sets[3].supported = sets[2].supported && __builtin_cpu_supports("avx512bf16");
#endif
    const char* limit = std::getenv("FASTFT_ISA");
    names[0] = 0;
    used = sets;
    for (Set& set : sets) {
      set.supported = set.supported && set.kernels != nullptr;
      if (set.supported) {
        used = &set;
        if (names[0]) std::strcat(names, ",");
        std::strcat(names, set.name);
      }
      if (limit && std::strcmp(limit, set.name) == 0) {
        for (Set* above = &set + 1; above < sets + 4; ++above) above->supported = false;
        break;
      }
    }
  }
};

Choice& choice() {
  static Choice instance;
  return instance;
}

}  // namespace

// Without that instruction, avx512_bf16 is avx512, whose tiles widen.
const Kernels& kernels() {
  const Choice& c = choice();
  return *(c.widens && c.used == &c.sets[3] ? c.sets[2] : *c.used).kernels;
}
const char* isa() { return choice().used->name; }
const char* isas() { return choice().names; }

bool set_isa(const char* name) {
  for (const Set& set : choice().sets)
    if (set.supported && std::strcmp(set.name, name) == 0) {
      choice().used = &set;
      return true;
    }
  return false;
}

const char* bf16_products() { return &kernels() == choice().sets[3].kernels ? "dot" : "widen"; }

bool set_bf16_products(const char* how) {
  const bool widens = std::strcmp(how, "widen") == 0;
  if (!widens && std::strcmp(how, "dot") != 0) return false;
  Choice& c = choice();
  if (c.used == &c.sets[3]) c.widens = widens;  // else there is no choice
  return true;
}

}  // namespace fastft::cpu
