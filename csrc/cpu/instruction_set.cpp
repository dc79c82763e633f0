#include "cpu/instruction_set.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace dino_fast {
namespace {

const char* const kNames[] = {"portable", "avx2", "avx512"};

bool runs(Isa isa) {
#if defined(DINO_FAST_HAS_avx512) && defined(DINO_FAST_HAS_avx2)
  __builtin_cpu_init();
  if (isa == Isa::avx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
  if (isa == Isa::avx512) {
    return runs(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == Isa::portable;
}

Isa best() {
  if (runs(Isa::avx512)) return Isa::avx512;
  if (runs(Isa::avx2)) return Isa::avx2;
  return Isa::portable;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{best()};
  return isa;
}

}  // namespace

Isa current_isa() { return chosen().load(std::memory_order_relaxed); }

std::string isa_name() { return kNames[static_cast<int>(current_isa())]; }

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (runs(isa)) names.push_back(kNames[static_cast<int>(isa)]);
  }
  return names;
}

void set_isa(const std::string& name) {
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (name == kNames[static_cast<int>(isa)] && runs(isa)) {
      chosen().store(isa, std::memory_order_relaxed);
      return;
    }
  }
  std::string message = "instruction set '" + name + "' cannot run here; this machine has:";
  for (const std::string& other : supported_isas()) message += " " + other;
  throw std::invalid_argument(message);
}

}  // namespace dino_fast
