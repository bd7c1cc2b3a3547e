// The instruction set that a file is compiled for. CMakeLists.txt defines its namespace, EK_ISA,
// and the floats of a vector, EK_LANES; the defaults let a header be parsed alone.
#pragma once

#ifndef EK_ISA
#define EK_ISA parsed_alone
#endif

#ifndef EK_LANES
#if defined(__AVX512F__)
#define EK_LANES 16
#elif defined(__F16C__)
#define EK_LANES 8
#else
#define EK_LANES 4
#endif
#endif
