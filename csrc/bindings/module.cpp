// The Python module dino_fast._C.
#include "bindings/bindings.h"

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace {

// glibc hands large blocks back to the kernel when they are freed, and every page of the next one must be touched anew,
// which can cost more than the arithmetic on it. With these thresholds the process keeps freed memory.
bool keep_freed_memory() {
#ifdef __GLIBC__
  return mallopt(M_MMAP_THRESHOLD, 1 << 30) == 1 && mallopt(M_TRIM_THRESHOLD, INT32_MAX) == 1 &&
         mallopt(M_TOP_PAD, 64 << 20) == 1;
#else
  return false;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using namespace dino_fast::bindings;
  m.def("isa", &dino_fast::isa_name);
  m.def("supported_isas", &dino_fast::supported_isas);
  m.def("set_isa", &dino_fast::set_isa);
  m.def("keep_freed_memory", &keep_freed_memory);
  bind_dino_loss(m);
  bind_linear_dino_loss(m);
  bind_matmul(m);
  bind_multi_crop(m);
  bind_multi_tensor(m);
  bind_packed_attention(m);
#ifdef DINO_FAST_CUDA_VERSION
  m.attr("cuda_version") = DINO_FAST_CUDA_VERSION;
#else
  m.attr("cuda_version") = pybind11::none();
#endif
}
