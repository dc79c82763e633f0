// The CUDA kernels' block bodies as loops on the host: kernels and blocks one after another, the threads of a block in phases.
#include "cuda/multi_crop_blocks.h"

using namespace dino_fast;
using namespace dino_fast::cuda;

namespace {

// The columns of csrc/bindings/multi_crop.cpp.
std::vector<CropTask> tasks_of(int64_t n, const int64_t* c, const float* f) {
  std::vector<CropTask> tasks(n);
  for (int64_t i = 0; i < n; ++i, c += 18, f += 5) {
    CropTask& t = tasks[i];
    t.image = reinterpret_cast<const uint8_t*>(c[0]);
    t.height = c[1], t.width = c[2], t.top = c[3], t.left = c[4], t.box_height = c[5], t.box_width = c[6];
    t.crop_height = c[7], t.crop_width = c[8], t.crop = reinterpret_cast<void*>(c[9]);
    t.flip = c[10], t.grey = c[11], t.blur = c[12], t.solarize = c[13];
    for (int k = 0; k < 4; ++k) t.order[k] = int(c[14 + k]), t.factors[k] = f[k];
    t.radius = f[4];
  }
  return tasks;
}

void run_block(const CropPlan& plan, int kernel, uint32_t block) {
  static BlurScratch scratch;
  std::memset(&scratch, 0xcd, sizeof scratch);
  if (kernel == WEIGHTS) weights_block(plan, block);
  if (kernel == FIRST) first_block(plan, block);
  if (kernel == SECOND) second_block(plan, block);
  if (kernel == COLOUR) colour_block(plan, block);
  if (kernel == BLUR_ROWS) blur_rows_block(plan, block, scratch);
  if (kernel == BLUR_COLUMNS) blur_columns_block(plan, block, scratch);
}

}  // namespace

extern "C" {

CropTable* make_table(int64_t n, const int64_t* table, const float* numbers, int channels, int bfloat16, int down_first,
                      const float* mean, const float* std, char* error) {
  try {
    const CropOutput output{channels, bfloat16 != 0, down_first != 0, mean, std};
    return new CropTable(CropPlanner(tasks_of(n, table, numbers).data(), n, output).table());
  } catch (const std::invalid_argument& wrong) {
    std::strncpy(error, wrong.what(), 255);
    return nullptr;
  }
}

void free_table(CropTable* table) { delete table; }
uint64_t table_bytes(const CropTable* table) { return table->bytes.size(); }
uint64_t memory_bytes(const CropTable* table) { return table->memory; }
uint32_t grid(const CropTable* table, int kernel) { return table->plan.counts[kernel]; }
void write_table(const CropTable* table, void* to) { std::memcpy(to, table->bytes.data(), table->bytes.size()); }

// Backwards where asked: the result must not depend on the order in which blocks come.
void run_kernels(const CropTable* table, uint64_t base, int backwards) {
  CropPlan plan = table->plan;
  plan.base = base;
  for (int kernel = 0; kernel < CROP_KERNELS; ++kernel) {
    const uint32_t blocks = plan.counts[kernel];
    for (uint32_t i = 0; i < blocks; ++i) run_block(plan, kernel, backwards ? blocks - 1 - i : i);
  }
}
}
