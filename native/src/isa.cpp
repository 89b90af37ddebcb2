// Which instruction set runs: asks the CPU and, through XGETBV, the operating system.
#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace vivace {

#define VIVACE_TABLES(isa)                         \
  namespace isa {                                  \
  extern const LinearKernels linear_kernels;       \
  extern const IntegerKernels integer_kernels;     \
  extern const TableKernels table_kernels;         \
  extern const OpKernels op_kernels;               \
  extern const AttentionKernels attention_kernels; \
  extern const BlockKernels block_kernels;         \
  extern const PackKernels pack_kernels;           \
  }
#define VIVACE_ROW(isa)     \
  {Isa::isa,                \
   #isa,                    \
   &isa::linear_kernels,    \
   &isa::integer_kernels,   \
   &isa::table_kernels,     \
   &isa::op_kernels,        \
   &isa::attention_kernels, \
   &isa::block_kernels,     \
   &isa::pack_kernels}

VIVACE_TABLES(generic)
#if defined(__x86_64__)
VIVACE_TABLES(avx2)
VIVACE_TABLES(avx512)
VIVACE_TABLES(avx512vnni)
VIVACE_TABLES(avx512bf16)
#endif

namespace {

const Kernels kTables[] = {
    VIVACE_ROW(generic),
#if defined(__x86_64__)
    VIVACE_ROW(avx2),    VIVACE_ROW(avx512), VIVACE_ROW(avx512vnni), VIVACE_ROW(avx512bf16),
#endif
};
constexpr int kNumTables = sizeof(kTables) / sizeof(kTables[0]);
const char* const kNames[kNumIsas] = {"generic", "avx2", "avx512", "avx512vnni", "avx512bf16"};

#if defined(__x86_64__)
// The best instruction set that the CPU has and whose registers the system saves.
Isa best_of_cpu() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return Isa::generic;
  constexpr unsigned kFma = 1u << 12, kMovbe = 1u << 22, kPopcnt = 1u << 23, kXsave = 1u << 27;
  constexpr unsigned kAvx = 1u << 28, kF16c = 1u << 29;
  constexpr unsigned kFirst = kFma | kMovbe | kPopcnt | kXsave | kAvx | kF16c;
  if ((c & kFirst) != kFirst) return Isa::generic;
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & 0x6) != 0x6) return Isa::generic;  // xmm and ymm
  constexpr unsigned kLzcnt = 1u << 5;          // without it the instruction is another, silently
  if (!__get_cpuid(0x80000001, &a, &b, &c, &d) || !(c & kLzcnt)) return Isa::generic;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return Isa::generic;
  constexpr unsigned kBmi1 = 1u << 3, kAvx2 = 1u << 5, kBmi2 = 1u << 8;  // x86-64-v3
  if ((b & (kBmi1 | kAvx2 | kBmi2)) != (kBmi1 | kAvx2 | kBmi2)) return Isa::generic;
  const unsigned subleafs = a;
  const bool has_vnni = c >> 11 & 1u;
  constexpr unsigned kF = 1u << 16, kDq = 1u << 17, kCd = 1u << 28, kBw = 1u << 30, kVl = 1u << 31;
  constexpr unsigned kAll = kF | kDq | kCd | kBw | kVl;              // x86-64-v4
  if ((b & kAll) != kAll || (low & 0xe0) != 0xe0) return Isa::avx2;  // masks and zmm
  if (!has_vnni) return Isa::avx512;
  if (subleafs < 1 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return Isa::avx512vnni;
  return a >> 5 & 1u ? Isa::avx512bf16 : Isa::avx512vnni;
}
#else
Isa best_of_cpu() {
  return Isa::generic;
}
#endif

Isa best() {
  static const Isa isa = best_of_cpu();
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
  return kNames[static_cast<int>(isa)];
}

bool isa_available(Isa isa) {
  return static_cast<int>(isa) < kNumTables && static_cast<int>(isa) <= static_cast<int>(best());
}

const Kernels& select_kernels(const char* name) {
  const char* origin = "";
  if (name == nullptr || *name == '\0') {
    name = std::getenv("VIVACE_ISA");
    origin = " (from the environment variable VIVACE_ISA)";
  }
  if (name == nullptr || *name == '\0') return kTables[static_cast<int>(best())];
  std::string available;
  for (const Kernels& table : kTables) {
    if (!isa_available(table.isa)) continue;
    if (std::strcmp(table.name, name) == 0) return table;
    available += (available.empty() ? "" : ", ") + std::string(table.name);
  }
  bool known = false;
  for (const char* other : kNames) known |= std::strcmp(other, name) == 0;
  throw std::invalid_argument("instruction set '" + std::string(name) + "'" + origin +
                              (known ? " is not available on this machine" : " is unknown") +
                              ": use one of " + available);
}

}  // namespace vivace
