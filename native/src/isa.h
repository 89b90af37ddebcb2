// Which instruction set runs: one table of kernels per set, chosen once from what the CPU offers.
#pragma once

namespace vivace {

enum class Isa : int { generic = 0, avx2 = 1, avx512 = 2, avx512vnni = 3, avx512bf16 = 4 };
inline constexpr int kNumIsas = 5;

struct LinearKernels;
struct IntegerKernels;
struct TableKernels;
struct OpKernels;
struct AttentionKernels;
struct BlockKernels;
struct PackKernels;

// Everything that is compiled once per instruction set. A kernel file `*_kernels.cpp` defines, in
// namespace vivace::VIVACE_ISA, one table: `extern const LinearKernels linear_kernels`, and so on.
struct Kernels {
  Isa isa;
  const char* name;
  const LinearKernels* linear;
  const IntegerKernels* integer;
  const TableKernels* table;
  const OpKernels* ops;
  const AttentionKernels* attention;
  const BlockKernels* blocks;
  const PackKernels* pack;
};

const char* isa_name(Isa isa);

// True if the object exists in this build and the CPU and the operating system support it.
bool isa_available(Isa isa);

// Kernels by name ("generic", "avx2", "avx512", "avx512vnni", "avx512bf16"); null or empty: the
// environment variable VIVACE_ISA, or the best available. Throws std::invalid_argument with one
// clear sentence.
const Kernels& select_kernels(const char* name = nullptr);

}  // namespace vivace
