// Whether this process may use the tiles of Intel's AMX.
#pragma once

namespace entropy_kernels {

// Whether the processor has tiles (AMX-TILE) and products of bf16 on them (AMX-BF16).
bool processor_has_amx();

// Asks the operating system to let this process use tiles; empty, or why it refuses. The answer
// holds for later threads too. A thread's state grows by 8 KB at its first use of tiles.
const char* request_amx();

}  // namespace entropy_kernels
