// The stream that torch works on, and launch errors, without a torch header in kernel files.
#pragma once
#include <cuda_runtime_api.h>

namespace longctx::cuda {

// torch's current stream on the current device.
cudaStream_t current_stream();

// Throws std::runtime_error if the launch just made was refused. Does not wait for the kernel.
void check_launch(const char* op);

}  // namespace longctx::cuda
