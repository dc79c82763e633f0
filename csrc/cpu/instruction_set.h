// Which instruction set the CPU kernels use, chosen once at run time.
#pragma once

#include <string>
#include <vector>

namespace dino_fast {

enum class Isa { portable, avx2, avx512 };

Isa current_isa();
std::string isa_name();
std::vector<std::string> supported_isas();     // compiled in and runnable here, slowest first
void set_isa(const std::string& name);         // throws std::invalid_argument if it cannot run here

}  // namespace dino_fast

// DINO_FAST_DISPATCH(function)(arguments): the function of that name in the current instruction set's namespace.
#if defined(DINO_FAST_HAS_avx512) && defined(DINO_FAST_HAS_avx2)
#define DINO_FAST_DISPATCH(function)                                                \
  (::dino_fast::current_isa() == ::dino_fast::Isa::avx512 ? &::dino_fast::avx512::function \
   : ::dino_fast::current_isa() == ::dino_fast::Isa::avx2 ? &::dino_fast::avx2::function   \
                                                          : &::dino_fast::portable::function)
#else
#define DINO_FAST_DISPATCH(function) (&::dino_fast::portable::function)
#endif

// DINO_FAST_DECLARE(declarations): the same declarations in each compiled namespace.
#if defined(DINO_FAST_HAS_avx512) && defined(DINO_FAST_HAS_avx2)
#define DINO_FAST_DECLARE(...)                     \
  namespace dino_fast { namespace portable { __VA_ARGS__ } } \
  namespace dino_fast { namespace avx2 { __VA_ARGS__ } }     \
  namespace dino_fast { namespace avx512 { __VA_ARGS__ } }
#else
#define DINO_FAST_DECLARE(...) \
  namespace dino_fast { namespace portable { __VA_ARGS__ } }
#endif
