// Functions marked LONGCTX_HD compile for the CPU and, under nvcc, for the device as well.
#pragma once

#ifdef __CUDACC__
#define LONGCTX_HD __host__ __device__
#else
#define LONGCTX_HD
#endif
