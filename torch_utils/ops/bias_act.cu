// Starts the bias_act kernels on a GPU.

#include <cuda_runtime.h>

#include "bias_act_kernel.h"

namespace sgr {

int bias_act_launch(const BiasActParams& p, void* stream) {
    return bias_act_choose(p, [&](auto kernel, int64_t blocks) -> int {
        using K = decltype(kernel);
        if (blocks > MAX_BLOCKS) return cudaErrorInvalidConfiguration;
        kernel_entry<K><<<static_cast<unsigned>(blocks), K::THREADS, 0, static_cast<cudaStream_t>(stream)>>>(p);
        return cudaGetLastError();
    });
}

}  // namespace sgr
