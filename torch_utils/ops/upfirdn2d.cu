// Starts the upfirdn2d kernels on a GPU.

#include <cuda_runtime.h>

#include "upfirdn2d_kernel.h"

namespace sgr {

int upfirdn2d_launch(const UpfirdnParams& p, void* stream) {
    return upfirdn2d_choose(p, [&](auto kernel, const UpfirdnParams& planned, int64_t blocks) -> int {
        using K = decltype(kernel);
        if (blocks > MAX_BLOCKS) return cudaErrorInvalidConfiguration;
        kernel_entry<K><<<static_cast<unsigned>(blocks), K::THREADS, 0, static_cast<cudaStream_t>(stream)>>>(planned);
        return cudaGetLastError();
    });
}

}  // namespace sgr
